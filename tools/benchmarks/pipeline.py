"""What a pipeline's bubble costs: a step of two stages on two processes, against what the formula of 1F1B says.

    python tools/benchmarks/pipeline.py                   # one result file

The prediction owes nothing to the pipeline's own clock. One process makes the same step of the whole model, with a copy
of itself on the other core, so that both share the machine as two stages do; if that takes T for m micro-batches, a
pipeline of S stages, whose slowest one has a part w of the work, should take T x w x (m + S - 1) / m: each of the m
micro-batches and of the S - 1 slots of filling and draining costs what the slowest stage takes.
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
from llm.parallel.stages import bubble, split
from tools.benchmarks.harness import RESULTS, Bar, Spread, check_same_work, table, write_result
from tools.benchmarks.parallel import run_jobs

STAGES = 2
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
        raise UserError(f"--rounds={rounds} --steps={steps} --micro_batches={micro_batches}: at least 3 rounds, 1, 1")
    sections = [compare(precision, micro_batches, rounds, steps)]
    how = "Jobs took turns, each on two cores: two processes of one thread that are a pipeline, or alone and twice"
    path = write_result(f"pipeline-{precision}", "The bubble of a pipeline", sections, Path(output), how)
    print("\n\n".join(sections), f"\nwritten to {path}")


def compare(precision: str, micro_batches: tuple[int, ...], rounds: int, steps: int) -> str:
    """Markdown of the measured and the predicted times."""
    slowest = max(stage.share for stage in split(ModelArgs.model_validate(MODEL), STAGES, SEQ_LEN))
    rows, bars = [], []
    for m in micro_batches:
        task = {"model": MODEL, "precision": precision, "steps": steps, "batch": m, "micro_batches": m}
        alone, piped = in_turn(task | {"seq_len": SEQ_LEN}, rounds)
        predicted = [seconds * slowest * (m + STAGES - 1) / m for seconds in alone]
        ratio = Spread.of([measured / formula for measured, formula in zip(piped, predicted, strict=True)])
        idle = Spread.of([1 - whole / STAGES / measured for whole, measured in zip(alone, piped, strict=True)])
        times = [Spread.of(seconds).text() for seconds in (alone, predicted, piped)]
        rows.append([str(m), *times, ratio.text(), f"{bubble(STAGES, m):.1%}", f"{idle.median:.1%}"])
        if m == BAR_AT:
            bars.append(Bar("step time over the formula's", ratio.median, 1 + NEAR, at_least=False))
            bars.append(Bar("step time over the formula's", ratio.median, 1 - NEAR))
    head = ["m", "s a step, one process", "s a step, by the formula", "s a step, pipeline", "measured over formula"]
    head += ["bubble, by the formula", "not working, measured"]
    bullets = "\n".join(f"* m={BAR_AT}: {bar.text()}" for bar in bars)
    return (
        f"## {STAGES} stages, one forward and one backward in turn (1F1B), {precision}\n\nwidth {MODEL['dim']}, "
        f"{MODEL['n_layers']} layers, vocabulary {MODEL['vocab_size']:,}; the slowest stage has {slowest:.1%} of the "
        f"work; m micro-batches of {SEQ_LEN} tokens a step; AdamW, ZeRO-1, gloo; {rounds} rounds of {steps} steps. "
        "*Not working* is what is missing of both cores at the rate of one process: bubble, sending, and whatever a "
        f"stage costs that a whole model does not\n\n{table(head, rows)}\n\n{bullets}"
    )


def in_turn(task: dict[str, Any], rounds: int) -> tuple[list[float], list[float]]:
    """Seconds a step of each round: of one process, the mean of two side by side, and of the pipeline."""
    seconds: dict[int, list[float]] = {1: [], STAGES: []}
    for number in range(rounds):
        losses = {}
        for stages in seconds if number % 2 == 0 else reversed(seconds):
            found = run_jobs(task | {"layout": {"pipeline": stages}}, stages, jobs=STAGES // stages)
            seconds[stages].append(statistics.mean(run["step"] for run in found))
            losses[f"{stages} stages"] = found[0]["loss"]
        check_same_work(losses, SAME_LOSS[task["precision"]])
    return seconds[1], seconds[STAGES]


if __name__ == "__main__":
    run_cli(benchmark)
