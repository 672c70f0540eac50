"""What a pipeline's bubble costs: a step on two processes that are a pipeline, against what the formula says.

    python tools/benchmarks/pipeline.py                   # one result file

The prediction owes nothing to the pipeline's own clock. One process makes the same step of the whole model, with a copy
of itself on the other core, so that both share the machine as two ranks do; if that takes T, and a rank waits a part b
of a step (llm/parallel/stages.py), a pipeline of S ranks whose busiest one has a part w of the work should take
T x w / (1 - b). With one forward and one backward in turn that is T x w x (m + S - 1) / m for m micro-batches.
"""

import os
import statistics
import sys
from pathlib import Path
from typing import Any, Literal

os.environ["OMP_NUM_THREADS"] = "1"

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from llm.args import ModelArgs
from llm.cli import run_cli
from llm.errors import UserError
from llm.parallel.layout import Layout, PipelineSchedule
from llm.parallel.stages import bubble, split
from tools.benchmarks.harness import RESULTS, Bar, Spread, check_same_work, table, write_result
from tools.benchmarks.parallel import run_jobs

RANKS, ALONE = 2, "one process"
MODEL: dict[str, Any] = {  # the head weighs what a layer does: nine layers and the head make two equal stages
    "dim": 512, "n_layers": 9, "n_heads": 8, "n_kv_heads": 4, "ffn_hidden": 1408, "vocab_size": 6272,
    "max_seq_len": 512, "tie_embeddings": False,
}  # fmt: skip
SEQ_LEN, SAME_LOSS = 256, {"fp32": 1e-4, "bf16": 1e-2}
BAR_AT, NEAR = 8, 0.15
"""Micro-batches of the step that is expected so near the formula."""


def benchmark(
    precision: Literal["fp32", "bf16"] = "fp32",
    micro_batches: tuple[int, ...] = (4, 8),
    rounds: int = 7,
    steps: int = 2,
    output: str = str(RESULTS),
) -> None:
    """Time a step of a pipeline and of one process, and write a dated result file.

    precision: arithmetic
    micro_batches: of a step, each of one row; several numbers are measured one after the other
    rounds: jobs of each kind
    steps: steps of a job that count, after three that do not
    output: folder of the result file
    """
    if rounds < 3 or steps < 1 or min(micro_batches, default=0) < 1:
        raise UserError(f"--rounds={rounds} --steps={steps} --micro_batches={micro_batches}: at least 3, 1 and 1")
    sections = [compare(precision, micro_batches, rounds, steps)]
    how = "Jobs took turns, each on two cores: two processes of one thread that are a pipeline, or alone and twice"
    path = write_result(f"pipeline-{precision}", "The bubble of a pipeline", sections, Path(output), how)
    print("\n\n".join(sections), f"\nwritten to {path}")


def compare(precision: str, micro_batches: tuple[int, ...], rounds: int, steps: int) -> str:
    """Markdown of the measured and the predicted times."""
    rows, bars = [], []
    for m in micro_batches:
        task = {"model": MODEL, "precision": precision, "steps": steps, "batch": m, "micro_batches": m}
        seconds = in_turn(task | {"seq_len": SEQ_LEN}, rounds, {ALONE: Layout(1), **pipelines(m)})
        rows.append([str(m), ALONE, Spread.of(seconds[ALONE]).text(), *["-"] * 4])
        for name, layout in pipelines(m).items():
            waits = bubble(layout.pipeline, m, layout.pipeline_schedule)
            predicted = [whole * busiest(layout) / (1 - waits) for whole in seconds[ALONE]]
            ratio = Spread.of([own / formula for own, formula in zip(seconds[name], predicted, strict=True)])
            pairs = zip(seconds[ALONE], seconds[name], strict=True)
            idle = Spread.of([1 - whole / RANKS / own for whole, own in pairs])
            times = [Spread.of(values).text() for values in (seconds[name], predicted)]
            rows.append([str(m), name, *times, ratio.text(), f"{waits:.1%}", f"{idle.median:.1%}"])
            if m == BAR_AT and layout.pipeline_schedule == "1f1b":
                bars.append(Bar("step time over the formula's", ratio.median, 1 + NEAR, at_least=False))
                bars.append(Bar("step time over the formula's", ratio.median, 1 - NEAR))
    head = ["m", "", "s a step", "by the formula", "measured over formula", "bubble, by the formula"]
    bullets = "\n".join(f"* 1f1b, m={BAR_AT}: {bar.text()}" for bar in bars)
    shares = ", ".join(f"{busiest(layout):.1%} with {name}" for name, layout in pipelines(BAR_AT).items())
    return (
        f"## {RANKS} ranks, {precision}\n\nwidth {MODEL['dim']}, {MODEL['n_layers']} layers, vocabulary "
        f"{MODEL['vocab_size']:,}; the busiest rank has {shares} of the work; m micro-batches of {SEQ_LEN} tokens a "
        f"step; AdamW, ZeRO-1, gloo; {rounds} rounds of {steps} steps. *Not working* is what is missing of both cores "
        "at the rate of one process: bubble, sending, and whatever a stage costs that a whole model does not\n\n"
        f"{table([*head, 'not working, measured'], rows)}\n\n{bullets}"
    )


def pipelines(micro_batches: int) -> dict[str, Layout]:
    """The schedules that go with so many micro-batches."""
    schedules: tuple[PipelineSchedule, ...] = ("1f1b", "dualpipev") if micro_batches >= 2 * RANKS else ("1f1b",)
    return {name: Layout(RANKS, pipeline=RANKS, pipeline_schedule=name) for name in schedules}


def busiest(layout: Layout) -> float:
    """The part of the work that the rank with most of it has."""
    stages = split(ModelArgs.model_validate(MODEL), layout.stages, SEQ_LEN)
    return max(sum(stages[number].share for number in layout.stages_of(place)) for place in range(layout.pipeline))


def in_turn(task: dict[str, Any], rounds: int, layouts: dict[str, Layout]) -> dict[str, list[float]]:
    """Seconds a step of each layout in each round; of one on a single process, the mean of two side by side."""
    seconds: dict[str, list[float]] = {name: [] for name in layouts}
    for number in range(rounds):
        losses = {}
        for name in seconds if number % 2 == 0 else reversed(seconds):
            layout = layouts[name]
            asked = {"pipeline": layout.pipeline, "pipeline_schedule": layout.pipeline_schedule}
            found = run_jobs(task | {"layout": asked}, layout.world, jobs=RANKS // layout.world)
            seconds[name].append(statistics.mean(run["step"] for run in found))
            losses[name] = found[0]["loss"]
        check_same_work(losses, SAME_LOSS[task["precision"]])
    return seconds


if __name__ == "__main__":
    run_cli(benchmark)
