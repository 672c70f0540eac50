"""Which curves of a run are drawn, in which order, and what is written on them: rows of tables, not code."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import NamedTuple

import numpy as np

from llm.report.folder import MARKED, RunFolder
from llm.report.rows import Column, Metrics, derived
from llm.report.thin import packed, smoothed, thinned, window_of

LOADS = "Experts"
"""The section that the maps of experts' loads are in, too."""
WAIT = "wait"
"""The derived field: share of a step's time that went into waiting for data."""
COLOURS = 8
"""Those of the page; of more curves they come again, with another dash."""
MOST_MARKS = 40


@dataclass(frozen=True)
class Plan:
    """A chart: what it is called and which fields it has, each by the words that it is called there."""

    title: str
    unit: str
    fields: tuple[tuple[str, str], ...]
    log: bool = False


class Section(NamedTuple):
    title: str
    plans: list[Plan]


@dataclass
class Curve:
    """A line of a chart. style: `thin` behind a mean over it, `line`, or `dots` for what is measured now and then."""

    name: str
    colour: int
    dash: int
    style: str
    column: Column
    error: Column | None = None


@dataclass
class Chart:
    title: str
    unit: str
    log: bool
    curves: list[Curve] = field(default_factory=list)
    marks: list[tuple[int, str]] = field(default_factory=list)

    def to_json(self, pixels: int) -> dict[str, object]:
        """For llm/report/page.js; the points that `pixels` in a row can show."""
        there = [curve.column.steps for curve in self.curves]
        span = min(int(steps[0]) for steps in there), max(int(steps[-1]) for steps in there)
        return {
            "title": self.title,
            "unit": self.unit,
            "log": self.log,
            "curves": [_curve_json(curve, pixels, span) for curve in self.curves],
            "marks": self.marks,
        }


def _curve_json(curve: Curve, pixels: int, span: tuple[int, int]) -> dict[str, object]:
    thin = thinned(curve.column, pixels, span)
    found: dict[str, object] = {"name": escape(curve.name), "style": curve.style}
    found |= {"colour": curve.colour % COLOURS, "dash": curve.dash + curve.colour // COLOURS}
    found |= {"x": packed(thin.steps, "u4"), "y": packed(thin.values, "f4")}
    if curve.error is not None and len(curve.error.steps) == len(thin.steps):
        found["error"] = packed(curve.error.values, "f4")
    return found


HELD_OUT = (("valid_loss", "held out"), ("valid_loss_ema", "held out, averaged weights"))
LOSS = Plan("Loss", "nats", (("loss", "training"), *HELD_OUT))
TRAINING = (
    Plan("Learning rate", "", (("lr", "learning rate"),)),
    Plan("Gradient norm", "before clipping", (("grad_norm", "gradient norm"),), log=True),
    Plan("Loss scale", "fp16", (("loss_scale", "loss scale"),), log=True),
    Plan("Rows of a step", "rows", (("batch_size", "rows"),)),
    Plan("Tokens of a row", "tokens", (("seq_len", "tokens"),)),
)
EXPERTS = (
    Plan(
        "Busiest expert and rank", "of an even share",
        (("expert_load", "busiest expert of any layer"), ("expert_rank_load", "busiest rank")),
    ),
    Plan("Assignments that found their expert full", "share", (("moe_overflow", "overflow"),)),
    Plan("Tokens that attend in routed layers", "share", (("route_rate", "attend"), ("route_overflow", "overflow"))),
    Plan("Gate of tokens that attend", "mean", (("route_gate", "gate"),)),
)  # fmt: skip
SPEED = (
    Plan("Tokens per second", "tokens/s", (("tokens_per_s", "tokens/s"),)),
    Plan("Time of a step", "seconds", (("step_time_s", "step"),)),
    Plan("Waiting for data", "share of the step", ((WAIT, "wait"),)),
    Plan("Memory", "GiB, peak of rank 0", (("memory_gb", "memory"),)),
    Plan("Model FLOPs utilisation", "share of the peak", (("mfu", "mfu"),)),
)
DATA = (Plan("Passes over the data", "epochs", (("epoch", "epochs"),)),)
SPEEDS = ("tokens_per_s", "step_time_s", "mfu")
PASSED_OVER = "passed over"
"""What metrics.jsonl says of a step that was not computed."""
PLAIN = ("batch_size", "seq_len", "expert_rank_load", "moe_balance_loss", "moe_z_loss")
"""Fields that say nothing where they never change."""
UNSEEN = {"tokens", "targets", "routing_checksum", "tokens_per_s_per_device", "data_wait_s"}
"""Fields that are not drawn: sums that only grow, and what another field says better."""
OF_VALUES = ("regression_loss", "autoregressive_loss")
"""Fields of tasks whose losses are errors of numbers, and so no nats."""
WORDS = {
    "ppl": "perplexity", "acc": "accuracy", "bits_per_byte": "bits per byte", "roc_auc": "ROC AUC", "f1": "F1",
    "lm": "LM", "mlm": "MLM", "dpo": "DPO", "moe_balance": "MoE balance", "moe_z": "MoE z",
}  # fmt: skip


def sections(runs: Sequence[RunFolder]) -> list[tuple[str, list[Chart]]]:
    """All charts of these runs on the same axes, by section; those without a point are left out."""
    metrics = [run.metrics for run in runs]
    for of_run in metrics:
        _leave_out_uncomputed(of_run)
        wait = derived(of_run.column("data_wait_s"), of_run.column("step_time_s"))
        if len(wait.steps):
            of_run.columns[WAIT] = wait
    columns = dict.fromkeys(name for of_run in metrics for name in of_run.columns)
    names = [name for name in columns if _is_worth_it(name, metrics)]
    found = []
    for title, plans in _planned(names, several=len(runs) > 1):
        charts = [chart for plan in plans if (chart := _chart(plan, runs)).curves]
        if charts or (title == LOADS and any(run.experts for run in runs)):
            found.append((title, charts))
    return found


def _leave_out_uncomputed(metrics: Metrics) -> None:
    """Steps that were passed over take no time: their speed would be the only thing to be seen of a chart."""
    steps = [step for step, why in metrics.skipped if why == PASSED_OVER]
    for name in SPEEDS if steps else ():
        if name in metrics.columns:
            column = metrics.columns[name]
            made = ~np.isin(column.steps, steps)
            metrics.columns[name] = Column(column.steps[made], column.values[made])


def _planned(names: Sequence[str], several: bool) -> Iterator[Section]:
    fixed = (LOSS, *TRAINING, *EXPERTS, *SPEED, *DATA)
    taken = {name for plan in fixed for name, _ in plan.fields} | UNSEEN
    parts = [name for name in names if name.endswith("_loss") and not name.startswith("valid_")]
    of_sources = [name for name in names if name.startswith("loss/")]
    validation = [name for name in names if name.startswith("valid_") and name not in taken]
    tasks = [name for name in names if name.startswith("eval/") and not name.endswith("_stderr")]
    losses = [LOSS]
    if len(parts) > 1:
        named = [(name, _words(name.removesuffix("_loss"))) for name in parts]
        losses += _together("Parts of the loss", named, several)
    named = [(name, name.removeprefix("loss/")) for name in of_sources]
    yield Section("Loss", [*losses, *_together("Loss of each source", named, several)])
    held_out = [(name, _words(name.removeprefix("valid_"))) for name in validation]
    yield Section("Held out", [Plan(words, "", ((name, "held out"),)) for name, words in held_out])
    yield Section("Tasks", [Plan(name.removeprefix("eval/"), "", ((name, "score"),)) for name in tasks])
    yield Section("Optimizer", list(TRAINING))
    yield Section(LOADS, list(EXPERTS))
    yield Section("Speed and memory", list(SPEED))
    taken |= {*parts, *of_sources, *validation}
    rest = [name for name in names if name not in taken and not name.startswith("eval/")]
    yield Section("Other measures", [*DATA, *(Plan(_words(name), "", ((name, _words(name)),)) for name in rest)])


def _together(title: str, named: Sequence[tuple[str, str]], several: bool) -> list[Plan]:
    """One chart of all fields; of several runs a chart for each field, as their colours are those of the runs."""
    if several:
        return [Plan(f"{title}: {words}", "nats", ((name, words),)) for name, words in named]
    return [Plan(title, "nats", tuple(named))] if named else []


def _words(name: str) -> str:
    words = WORDS.get(name, name.replace("_", " "))
    return words[:1].upper() + words[1:]


def _chart(plan: Plan, runs: Sequence[RunFolder]) -> Chart:
    of_values = any(name in run.metrics.columns for run in runs for name in OF_VALUES)
    chart = Chart(plan.title, "" if of_values and plan.unit == "nats" else plan.unit, plan.log)
    several = len(runs) > 1
    fields = [(name, words) for name, words in plan.fields if _is_worth_it(name, [run.metrics for run in runs])]
    for place, run in enumerate(runs):
        for number, (name, words) in enumerate(fields):
            column = run.metrics.column(name)
            if not len(column.steps):
                continue
            label = (f"{run.name}: {words}" if len(fields) > 1 else run.name) if several else words
            colour, dash = (place, number) if several and plan is not LOSS else (place if several else number, 0)
            made = _curves(label, colour, dash, column, run.metrics.column(f"{name}_stderr"))
            if several and name == "loss" and made[0].style == "line":
                made[0].style = "thin"  # behind what is held out, which has the run's colour too
            chart.curves += made
        if plan is LOSS:
            chart.marks += _marks(run)
    return chart


def _is_worth_it(name: str, metrics: Sequence[Metrics]) -> bool:
    values = {float(v) for m in metrics if len(c := m.column(name).values) for v in (c.min(), c.max())}
    return name not in PLAIN or len(values) > 1


def _curves(label: str, colour: int, dash: int, column: Column, error: Column) -> list[Curve]:
    """A field's own, and where that goes up and down a lot a mean over it."""
    steps = column.steps
    now_and_then = len(steps) <= 400 and (len(steps) < 2 or int(steps[-1] - steps[0]) >= 2 * (len(steps) - 1))
    window = 0 if now_and_then else window_of(column)
    style = "dots" if now_and_then else "thin" if window else "line"
    matching = error if len(error.steps) == len(steps) and (error.steps == steps).all() and len(steps) else None
    own = Curve(label, colour, dash, style, column, matching)
    mean = Curve(f"{label}, mean of {window:,}", colour, dash, "line", smoothed(column, window)) if window else None
    return [own] if mean is None else [own, mean]


def _marks(run: RunFolder) -> list[tuple[int, str]]:
    """Events of the run that are drawn into a curve, a line a step."""
    marks = {event.step: event.kind for event in run.events if event.kind in MARKED}
    return sorted(marks.items())[:MOST_MARKS]
