"""Makes the tables of numbers that docs/values.md trains on: two regressions in five splits, and a series.

`python tools/values.py --data friedman` writes runs/data/values/friedman/split-0 to split-4, each with train.csv and
valid.csv; `--data diabetes` likewise (442 patients, of scikit-learn, which must be installed: `make chem`); `--data
mackey_glass` writes train.csv and valid.csv, one row a step.

Sources: Friedman 1991, "Multivariate adaptive regression splines", as scikit-learn's make_friedman1 draws it; Mackey
and Glass 1977 (doi:10.1126/science.267326), whose delayed differential equation is integrated by Runge-Kutta steps.
"""

import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import llm.installed  # noqa: F401  (says in one line what is missing)

import numpy as np
from numpy.typing import NDArray

from llm.atomic import write_file
from llm.cli import run_cli
from llm.errors import UserError
from llm.paths import PathText

FOLDER = "runs/data/values"
SPLITS = 5
FRIEDMAN_ROWS = 4000
STEPS, HELD_OUT = 10_000, 2_000
EVERY = 6
"""Units of time between two steps of the Mackey-Glass series, as in Lapedes and Farber 1987: at 1 the series is so
smooth that a linear extrapolation is right to 0.05 % of its deviation."""
RUNGE_KUTTA = 10
"""Steps of the integration in a unit of time."""
WARM_UP = 1_000
"""Units of time before the first step, after which the beginning is forgotten."""

Floats = NDArray[np.float64]


def prepare(data: Literal["friedman", "diabetes", "mackey_glass"], output: PathText | None = None) -> None:
    """Write the tables of a data set; what is there already is written anew.

    data: friedman, diabetes or mackey_glass
    output: a folder; default: runs/data/values and the name
    """
    folder = Path(output or f"{FOLDER}/{data}")
    if data == "mackey_glass":
        series = mackey_glass(STEPS)[:, None]
        for side, steps in (("train", series[:-HELD_OUT]), ("valid", series[-HELD_OUT:])):
            _write(folder / f"{side}.csv", ["x"], steps)
        print(f"{folder}: {STEPS - HELD_OUT:,} steps to train on, {HELD_OUT:,} held out")
        return
    x_nF, y_n = friedman() if data == "friedman" else diabetes()
    names = [*(f"x{i}" for i in range(x_nF.shape[1])), "y"]
    rows = np.column_stack([x_nF, y_n])
    for k, (train, valid) in enumerate(splits(len(rows))):
        for side, numbers in (("train", train), ("valid", valid)):
            _write(folder / f"split-{k}" / f"{side}.csv", names, rows[numbers])
    print(f"{folder}: {SPLITS} splits of {len(rows):,} rows")


def friedman(rows: int = FRIEDMAN_ROWS, noise: float = 1.0, seed: int = 0) -> tuple[Floats, Floats]:
    """What make_friedman1(rows, noise=noise, random_state=seed) of scikit-learn returns, bit for bit: (rows, 10)
    values, of which five matter, and (rows,) answers.
    """
    draw = np.random.RandomState(seed)
    x = draw.uniform(size=(rows, 10))
    signal = 10 * np.sin(np.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
    return x, signal + noise * draw.standard_normal(size=rows)


def diabetes() -> tuple[Floats, Floats]:
    """(442, 10) values of patients and (442,) how far the illness went in a year. UserError without scikit-learn."""
    try:
        from sklearn.datasets import load_diabetes  # of the extra `chem`
    except ImportError:
        raise UserError("--data=diabetes: comes with scikit-learn, which is not installed; `make chem`") from None
    found = load_diabetes()
    return found.data, found.target


def splits(rows: int) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """(train, held out) row numbers of each split: every fifth row of one order, drawn once, is held out in turn."""
    order = np.random.RandomState(0).permutation(rows)
    return [(np.delete(order, np.arange(k, rows, SPLITS)), order[k::SPLITS]) for k in range(SPLITS)]


def mackey_glass(steps: int, every: int = EVERY, tau: float = 17.0) -> Floats:
    """(steps,) of dx/dt = 0.2 x(t - tau) / (1 + x(t - tau)^10) - 0.1 x, at x = 1.2 before it begins."""
    size, lag = 1 / RUNGE_KUTTA, round(tau * RUNGE_KUTTA)
    total = (WARM_UP + steps * every) * RUNGE_KUTTA
    x = np.full(lag + total + 1, 1.2)

    def slope(now: float, delayed: float) -> float:
        return float(0.2 * delayed / (1 + delayed**10) - 0.1 * now)

    for i in range(lag, lag + total):
        now, first, last = float(x[i]), float(x[i - lag]), float(x[i - lag + 1])
        middle = (first + last) / 2
        k1 = slope(now, first)
        k2 = slope(now + size / 2 * k1, middle)
        k3 = slope(now + size / 2 * k2, middle)
        k4 = slope(now + size * k3, last)
        x[i + 1] = now + size / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x[lag + WARM_UP * RUNGE_KUTTA :: every * RUNGE_KUTTA][:steps]


def _write(path: Path, names: Sequence[str], rows: Floats) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(names)
    writer.writerows(rows.tolist())
    write_file(path, text.getvalue().encode())


if __name__ == "__main__":
    run_cli(prepare)
