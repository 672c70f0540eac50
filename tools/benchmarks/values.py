"""Models of values against linear ones (issue M): two regressions in five splits each, and a chaotic series.

    python tools/benchmarks/values.py run --data friedman
    python tools/benchmarks/values.py run --data diabetes
    python tools/benchmarks/values.py run --data mackey_glass
    python tools/benchmarks/values.py report

Each `run` prepares the data (tools/values.py), trains by the config of its name under configs/pretrain, split after
split, and scores the last checkpoint on the held-out rows, by which nothing was chosen. Beside it stands ridge
regression (penalty 1), or of the series an autoregression: least squares on the last 32 steps.
"""

import csv
import json
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Literal

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
from numpy.typing import NDArray

from llm import LLM
from llm.atomic import write_file
from llm.cli import run_cli
from llm.errors import UserError
from llm.evaluate.charts import Series, curves
from llm.paths import PathText
from tools.benchmarks.harness import RESULTS
from tools.benchmarks.machine import hardware, versions
from tools.values import FOLDER, HELD_OUT, SPLITS, prepare

ROOT = Path(__file__).resolve().parents[2]
WORK = "runs/values"
LAGS, FREE, EVERY = 32, 50, 10
"""Steps that an autoregression reads; that are predicted in a row; from one such row to the next."""
CONTEXT = 64
"""Steps that the model reads before those that it is scored on, at least half of them."""
SHOWN = 1000
"""The free run that is drawn begins so many steps into the held-out ones."""
STYLE = (
    "text{font:10px sans-serif;fill:#444}.grid{stroke:#ddd;fill:none}.axis{stroke:#888;fill:none}.band{display:none}"
    ".line{fill:none;stroke-width:1.5}.c0{stroke:#222}.c1{stroke:#d33}.c2{stroke:#38c}.dot{display:none}"
)
Floats = NDArray[np.float64]
Data = Literal["friedman", "diabetes", "mackey_glass"]


def run(data: Data, work: PathText = WORK) -> None:
    """Prepare, train and score one of the data sets, and write what was found to a JSON file.

    data: friedman, diabetes or mackey_glass
    work: the folder for runs and results
    """
    prepare(data)
    found = series(Path(work)) if data == "mackey_glass" else regression(data, Path(work))
    write_file(Path(work) / f"{data}.json", (json.dumps(found, indent=2) + "\n").encode())
    print(json.dumps({key: value for key, value in found.items() if key != "drawn"}, indent=2))


def regression(data: str, work: Path) -> dict[str, object]:
    """R2 on the held-out rows of each split, of the model and of ridge regression."""
    found: dict[str, list[float]] = {"model": [], "ridge": [], "seconds": []}
    for k in range(SPLITS):
        parts = Path(FOLDER) / data / f"split-{k}"
        (x, y), (x_held, y_held) = (_table(parts / f"{side}.csv") for side in ("train", "valid"))
        found["seconds"].append(_train(data, parts, work / f"{data}-{k}"))
        model = LLM.from_pretrained(work / f"{data}-{k}")
        said = model.predict_values(x_held[:, None].astype(np.float32), pooled=True).numpy()[:, 0]
        found["model"].append(r2(y_held, said))
        found["ridge"].append(r2(y_held, ridge(x, y)(x_held)))
    return dict(found)


def series(work: Path) -> dict[str, object]:
    """Root mean square errors of one step, and of 50 free-running ones, of the model and of the autoregression."""
    parts = Path(FOLDER) / "mackey_glass"
    seconds = _train("mackey_glass", parts, work / "mackey_glass")
    steps = np.concatenate([_columns(parts / f"{side}.csv")[:, 0] for side in ("train", "valid")])
    first = len(steps) - HELD_OUT
    weights = autoregression(steps[:first])
    lagged = np.lib.stride_tricks.sliding_window_view(steps[first - LAGS : -1], LAGS)
    linear = lagged @ weights[:-1] + weights[-1]
    model = LLM.from_pretrained(work / "mackey_glass")
    starts = range(first, len(steps) - FREE + 1, EVERY)
    wanted = np.stack([steps[at : at + FREE] for at in starts])
    before = np.stack([steps[at - CONTEXT : at] for at in starts])
    free = model.generate_values(before[:, :, None].astype(np.float32), FREE).numpy()[:, :, 0]
    free_linear = np.stack([extrapolated(weights, row[-LAGS:]) for row in before])
    at = SHOWN // EVERY
    said = one_step(model, steps, first)
    return {
        "one step": {"model": rmse(said, steps[first:]), "linear": rmse(linear, steps[first:])},
        f"{FREE} steps": {"model": rmse(free, wanted), "linear": rmse(free_linear, wanted)},
        "deviation": float(steps[first:].std()),
        "free runs": len(starts),
        "seconds": [seconds],
        "drawn": {"series": wanted[at].tolist(), "model": free[at].tolist(), "linear": free_linear[at].tolist()},
        "by step": {
            "model": np.sqrt(np.square(free - wanted).mean(0)).tolist(),
            "linear": np.sqrt(np.square(free_linear - wanted).mean(0)).tolist(),
        },
    }


def one_step(model: LLM, steps: Floats, first: int) -> Floats:
    """What the model says of each step from `first` on, having read the 32 before it or more."""
    half = CONTEXT // 2
    found = []
    for at in range(first, len(steps), half):
        read = steps[at - half : min(at + half, len(steps)) - 1]
        found.append(model.predict_values(read[:, None].astype(np.float32)).numpy()[half - 1 :, 0])
    return np.concatenate(found).astype(np.float64)


def ridge(x: Floats, y: Floats, penalty: float = 1.0) -> Callable[[Floats], Floats]:
    """Ridge regression with an intercept."""
    mean_x, mean_y = x.mean(0), y.mean()
    centred = x - mean_x
    weights = np.linalg.solve(centred.T @ centred + penalty * np.eye(x.shape[1]), centred.T @ (y - mean_y))

    def said(other: Floats) -> Floats:
        return np.asarray((other - mean_x) @ weights + mean_y, dtype=np.float64)

    return said


def autoregression(steps: Floats) -> Floats:
    """(33,) weights of the last 32 steps, oldest first, and an intercept, by least squares."""
    read = np.lib.stride_tricks.sliding_window_view(steps[:-1], LAGS)
    found = np.linalg.lstsq(np.column_stack([read, np.ones(len(read))]), steps[LAGS:], rcond=None)[0]
    return np.asarray(found, dtype=np.float64)


def extrapolated(weights: Floats, last: Floats) -> Floats:
    """The 50 steps after these, each read as the next one's past."""
    found = [*last.tolist()]
    for _ in range(FREE):
        found.append(float(np.dot(weights[:-1], found[-LAGS:]) + weights[-1]))
    return np.array(found[LAGS:])


def r2(wanted: Floats, said: Floats) -> float:
    """1 - the part of the variance that is left."""
    return float(1 - np.square(wanted - said).sum() / np.square(wanted - wanted.mean()).sum())


def rmse(said: Floats, wanted: Floats) -> float:
    """Root of the mean square of the differences."""
    return float(np.sqrt(np.square(said - wanted).mean()))


def report(work: PathText = WORK, output: PathText | None = None, notes: str = "") -> None:
    """Write a dated result of all that was scored, and the pictures beside it.

    work: the folder with the JSON files of `run`
    output: the file; default: tools/benchmarks/results/DATE-values.md
    notes: what else is to be said of the measurement
    """
    day = date.today().isoformat()
    file = Path(output or RESULTS / f"{day}-values.md")
    lines = [f"# Models of values, {day}", "", hardware(), "", versions(), "", *([notes, ""] if notes else [])]
    scored = {name: path for name in ("friedman", "diabetes") if (path := Path(work) / f"{name}.json").exists()}
    if scored:
        lines += ["R2 of held-out rows, mean of five splits (each):", "", "| data | model | ridge | seconds of a run |"]
        lines += ["| --- | --- | --- | --- |"]
    for name, path in scored.items():
        found = json.loads(path.read_text())
        model, linear = (
            f"{np.mean(found[key]):.3f} ({', '.join(f'{x:.3f}' for x in found[key])})" for key in ("model", "ridge")
        )
        lines.append(f"| {name} | {model} | {linear} | {min(found['seconds']):.0f} to {max(found['seconds']):.0f} |")
    path = Path(work) / "mackey_glass.json"
    if path.exists():
        lines += _of_series(json.loads(path.read_text()), file)
    write_file(file, ("\n".join(lines) + "\n").encode())
    print("\n".join(lines))


def _of_series(found: dict[str, dict[str, float]], file: Path) -> list[str]:
    lines = ["", f"Mackey-Glass, {HELD_OUT:,} held-out steps, whose deviation is {found['deviation']:.4f}; root mean",
             f"square errors; free runs: {found['free runs']}, from every {EVERY}th step on.", "",
             "| | model | autoregression of 32 lags |", "| --- | --- | --- |"]  # fmt: skip
    for name in ("one step", f"{FREE} steps"):
        lines.append(f"| {name} | {found[name]['model']:.5f} | {found[name]['linear']:.5f} |")
    for name, label in (("drawn", "value"), ("by step", "root mean square error")):
        drawn = [Series(which, list(range(1, FREE + 1)), y, [None] * FREE)  # type: ignore[arg-type]
                 for which, y in found[name].items()]  # fmt: skip
        if name == "by step":
            drawn.insert(0, Series("", [1, FREE], [0, 0], [None, None]))  # so that colours are those of the other
        picture = file.with_name(f"{file.stem}-{name.replace(' ', '-')}.svg")
        svg = curves(drawn, "step of the free run", label)
        svg = svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
        write_file(picture, svg.replace("<title>", f"<style>{STYLE}</style><title>", 1).encode() + b"\n")
        lines += ["", f"![{label} against the step of the free run]({picture.name})"]
    seconds = found["seconds"][0]  # type: ignore[index]
    lines += ["", f"Black: the series; red: the model; blue: the autoregression. Seconds of the run: {seconds:.0f}."]
    return lines


def _train(name: str, parts: Path, folder: Path) -> float:
    """Train by the config of a name, its output beside the run; returns its seconds."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "launch/pretrain.py", "--config", f"configs/pretrain/{name}.yaml"]
    command += ["--run_dir", str(folder.absolute())]
    command += [f"--data.{side}.path={(parts / side).absolute()}.csv" for side in ("train", "valid")]
    began = time.perf_counter()
    with folder.with_name(f"{folder.name}.log").open("wb") as log:
        code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        raise UserError(f"{' '.join(command)}: ended with {code}; see {folder}.log")
    return time.perf_counter() - began


def _table(path: Path) -> tuple[Floats, Floats]:
    """All columns but the last one, and that."""
    rows = _columns(path)
    return rows[:, :-1], rows[:, -1]


def _columns(path: Path) -> Floats:
    with path.open(newline="") as file:
        _, *rows = csv.reader(file)
    return np.array(rows, dtype=np.float64)


if __name__ == "__main__":
    run_cli(report, run=run, report=report)
