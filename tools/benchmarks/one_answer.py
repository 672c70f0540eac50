"""The picture at the top of README: one training on one process and on every layout of four, step by step.

    python tools/benchmarks/one_answer.py measure        # tools/layouts.py on the quickstart's data; a result file
    python tools/benchmarks/one_answer.py draw           # docs/one_answer.svg from the newest result file

`measure` takes the quickstart's config with the model made small (`--shrink` of tools/layouts.py: every kind of layer
stays) at a constant learning rate of 3e-4, the default, and wants the data of `tools/quickstart.py prepare`. What is
drawn on the right is the largest relative difference of a layout's losses, and of its gradient norms, from those of one
process. A difference of 0 is drawn on the lowest line, as logarithms end above it.
"""

import json
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import date
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import yaml

from llm.atomic import write_file
from llm.cli import run_cli
from llm.errors import UserError
from llm.evaluate.charts import number, ticks
from llm.paths import PathText
from tools.benchmarks.harness import RESULTS
from tools.benchmarks.machine import hardware, versions
from tools.layouts import layouts
from tools.layouts_plan import Settings

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/pretrain/quickstart.yaml"
PICTURE = ROOT / "docs" / "one_answer.svg"
RANKS, STEPS, LR = 4, 40, 3e-4
BOUND = 1e-5
"""Within which tools/layouts.py and the tests call two layouts equal in float32."""
FLOOR, CEILING = -10, -4
"""Powers of ten that the axis of differences begins and ends at."""
HEIGHT, TOP, BOTTOM = 300, 62, 252
INK = "#7a838e"
"""Of letters and lines: as far from white as from GitHub's dark page, as a picture does not know what it lies on."""
KINDS = {
    "data": ("data parallel, ZeRO 1 to 3", "#3f8cff"),
    "expert": ("with expert parallelism", "#d9822b"),
    "tensor": ("with tensor parallelism", "#23a26d"),
    "pipeline": ("with pipeline parallelism", "#c65bc0"),
}
"""What a layout is counted as, by the last of these that it has -> its words and colour."""


class Panel(NamedTuple):
    """Where a plot lies, and what its axes span."""

    left: float
    right: float
    x: tuple[float, float]
    y: tuple[float, float]

    def at(self, x: float, y: float) -> tuple[float, float]:
        """A point of the plot in the picture's own units."""
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return self.left + across * (self.right - self.left), BOTTOM - up * (BOTTOM - TOP)


def measure(output: PathText | None = None, steps: int = STEPS) -> None:
    """Train on one process and on every layout of four, and write every step's loss and gradient norm.

    output: the file; left out: a dated one among the results
    steps: optimizer steps
    """
    file = Path(output or RESULTS / f"{date.today()}-one-answer.json")
    config = yaml.safe_load((ROOT / CONFIG).read_text())
    config["model"] = str(ROOT / config["model"])
    config["optim"] = {**config["optim"], "lr": LR}
    with tempfile.TemporaryDirectory() as folder:
        own, found = Path(folder) / "one_answer.yaml", Path(folder) / "found.json"
        own.write_text(yaml.safe_dump(config))
        layouts(Settings(str(own), [RANKS], steps=steps, shrink=True, json=str(found)))
        document = short(json.loads(found.read_text()))
    text = json.dumps({"hardware": hardware(), "versions": versions(), **document}, indent=1)
    write_file(file, (text + "\n").encode())
    print(file)


def short(document: dict[str, Any]) -> dict[str, Any]:
    """What the picture needs of tools/layouts.py's table."""
    keys = ("tensor", "pipeline", "expert", "data", "zero_stage")
    return {
        "config": {key: document["config"][key] for key in ("model", "optim", "train")},
        "reference": columns(document["reference"]),
        "layouts": [{key: one[key] for key in keys} | columns(one["rows"]) for one in document["layouts"]],
    }


def columns(rows: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    return {key: [row[key] for row in rows] for key in ("loss", "grad_norm")}


def draw(result: PathText | None = None, output: PathText = str(PICTURE)) -> None:
    """Draw a result file.

    result: the file; left out: the newest of `measure` among the results
    output: the SVG to write
    """
    files = [Path(result)] if result else sorted(RESULTS.glob("*-one-answer.json"))
    if not files:
        raise UserError("no result to draw: python tools/benchmarks/one_answer.py measure makes one")
    write_file(Path(output), picture(json.loads(files[-1].read_text())).encode())
    print(output)


def picture(document: dict[str, Any]) -> str:
    """The SVG of a result."""
    reference, found = document["reference"], document["layouts"]
    n_steps, n_layouts = len(reference["loss"]), len(found)
    low, high = min(reference["loss"]), max(reference["loss"])
    losses = Panel(56, 366, (1, n_steps), (low - 0.05 * (high - low), high + 0.05 * (high - low)))
    apart = Panel(448, 758, (1, n_steps), (FLOOR, CEILING))
    title = f"One model, one process and {n_layouts} layouts of {RANKS} processes: {n_steps} steps in float32"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 780 {HEIGHT}" role="img" aria-label="{escape(title)}">',
        f"<title>{escape(title)}</title>",
        f"<style>text{{font:12px system-ui,sans-serif;fill:{INK}}}.head{{font-weight:600;font-size:13px}}"
        f".grid{{stroke:{INK};stroke-opacity:.25}}.line{{fill:none;stroke:{INK};stroke-width:1.5}}"
        f".bound{{stroke:{INK};stroke-width:1.5;stroke-dasharray:5 4}}</style>",
        text(losses.left, 20, f"Loss: one process (line), {n_layouts} layouts (dots)", "start", "head"),
        text(apart.left, 20, "Largest difference from one process", "start", "head"),
        text(apart.left, 38, "relative, of loss and gradient norm", "start"),
        text(losses.left, 38, "each layout has a dot at every few steps", "start"),
    ]
    parts += axes(losses, [(value, number(value)) for value in ticks(*losses.y, count=5)])
    parts += axes(apart, [(power, f"1e{power}") for power in range(FLOOR, CEILING + 1)])
    line = " ".join("{:.1f},{:.1f}".format(*losses.at(i, loss)) for i, loss in enumerate(reference["loss"], 1))
    parts.append(f'<polyline class="line" points="{line}"/>')
    for place, layout in enumerate(found):
        for step in range(place % n_steps, n_steps, max(1, n_layouts // 2)):
            parts.append(dot(*losses.at(step + 1, layout["loss"][step]), kind_of(layout), 3))
        for step, difference in enumerate(differences(layout, reference), 1):
            power = max(FLOOR, math.log10(difference)) if difference else FLOOR
            parts.append(dot(*apart.at(step, min(power, CEILING)), kind_of(layout), 2))
    _, bound = apart.at(1, math.log10(BOUND))
    parts.append(f'<path class="bound" d="M{apart.left} {bound:.1f}H{apart.right}"/>')
    parts.append(text(apart.right, bound - 6, f"bound of the tests, {BOUND:.0e}".replace("e-0", "e-"), "end"))
    for place, (words, colour) in enumerate(KINDS.values()):
        x = 20 + 190 * place
        parts += [f'<circle cx="{x}" cy="{HEIGHT - 10}" r="4" fill="{colour}"/>', text(x + 9, HEIGHT - 6, words)]
    return "\n".join([*parts, "</svg>"]) + "\n"


def differences(layout: dict[str, Any], reference: dict[str, Any]) -> Iterator[float]:
    """Of each step the larger of the relative differences of loss and gradient norm."""
    for step in range(len(reference["loss"])):
        yield max(abs(layout[key][step] / reference[key][step] - 1) for key in ("loss", "grad_norm"))


def kind_of(layout: dict[str, Any]) -> str:
    return next(kind for kind in reversed(KINDS) if kind == "data" or layout[kind] > 1)


def axes(panel: Panel, marks: Sequence[tuple[float, str]]) -> Iterator[str]:
    """Lines and labels of values, and of steps."""
    for value, label in marks:
        _, y = panel.at(panel.x[0], value)
        yield f'<path class="grid" d="M{panel.left} {y:.1f}H{panel.right}"/>'
        yield text(panel.left - 6, y + 4, label, "end")
    for step in ticks(*panel.x):
        yield text(panel.at(step, panel.y[0])[0], BOTTOM + 16, number(step), "middle")
    yield text(panel.left, BOTTOM + 16, "step")


def text(x: float, y: float, words: str, anchor: str = "start", name: str = "") -> str:
    of_class = f' class="{name}"' if name else ""
    return f'<text{of_class} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def dot(x: float, y: float, kind: str, radius: float) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{KINDS[kind][1]}" fill-opacity=".8"/>'


if __name__ == "__main__":
    run_cli(draw, measure=measure, draw=draw)
