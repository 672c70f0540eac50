"""What tensor and expert parallelism cost: a step on two processes of one machine, cut in each way, in turn.

    python tools/benchmarks/parallel.py                   # one result file

Every layout makes the same step (same weights, same rows); in each round every layout runs a job of its own, so that a
slow minute of the machine falls on all. Data parallelism (ZeRO-1) is what the others are compared with: it sends the
gradients once a step, where the others send activations in every layer.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

os.environ["OMP_NUM_THREADS"] = "1"

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from llm.cli import run_cli
from llm.errors import UserError
from llm.parallel.launch import local
from tools.benchmarks.harness import RESULTS, Spread, check_same_work, table, write_result

ROOT = Path(__file__).resolve().parents[2]
DENSE: dict[str, Any] = {
    "dim": 512, "n_layers": 6, "n_heads": 8, "n_kv_heads": 4, "ffn_hidden": 1408, "vocab_size": 8192,
    "max_seq_len": 512,
}  # fmt: skip
MOE: dict[str, Any] = {
    **DENSE, "dim": 384, "ffn_hidden": 1024,
    "moe": {"n_experts": 8, "top_k": 2, "hidden": 512, "interleave": 2, "aux_alpha": 0.01},
}  # fmt: skip
LAYOUTS: dict[str, dict[str, dict[str, Any]]] = {
    "dense": {
        "DP2": {},
        "TP2": {"tensor": 2},
        "TP2, sequence whole": {"tensor": 2, "sequence_parallel": False},
    },
    "moe": {"DP2": {}, "EP2": {"expert": 2}, "TP2": {"tensor": 2}},
}
SHAPES = {"dense": DENSE, "moe": MOE}
BATCH, SEQ_LEN, SAME_LOSS = 4, 512, {"fp32": 1e-4, "bf16": 1e-2}


def benchmark(
    model: Literal["dense", "moe", "all"] = "all",
    precision: Literal["fp32", "bf16"] = "bf16",
    rounds: int = 7,
    steps: int = 8,
    output: str = str(RESULTS),
) -> None:
    """Time a step of every layout and write a dated result file.

    model: which model, or both
    precision: arithmetic
    rounds: jobs of each layout
    steps: steps of a job that count, after three that do not
    output: folder of the result file
    """
    if rounds < 3 or steps < 1:
        raise UserError(f"--rounds={rounds} --steps={steps}: at least 3 rounds of 1 step")
    chosen = list(LAYOUTS) if model == "all" else [model]
    sections = [compare(name, precision, rounds, steps) for name in chosen]
    how = "Layouts took turns, each round with a new job of two processes of one thread"
    path = write_result(f"parallel-{model}-{precision}", "Layouts on two processes", sections, Path(output), how)
    print("\n\n".join(sections), f"\nwritten to {path}")


def compare(name: str, precision: str, rounds: int, steps: int) -> str:
    """Markdown of one model's layouts."""
    found: dict[str, list[dict[str, float]]] = {layout: [] for layout in LAYOUTS[name]}
    for number in range(rounds):
        order = list(found) if number % 2 == 0 else list(reversed(found))
        for layout in order:
            found[layout].append(measure(SHAPES[name], LAYOUTS[name][layout], precision, steps))
        check_same_work({layout: runs[-1]["loss"] for layout, runs in found.items()}, SAME_LOSS[precision])
    base = [run["step"] for run in found["DP2"]]
    rows = []
    for layout, runs in found.items():
        seconds = [run["step"] for run in runs]
        ratio = Spread.of([own / other for own, other in zip(seconds, base, strict=True)])
        share = statistics.median(run["talking"] / run["step"] for run in runs)
        rows.append([layout, Spread.of(seconds).text(), ratio.text(), f"{share:.0%}"])
    shape = SHAPES[name]
    moe = f", every second layer with {shape['moe']['n_experts']} experts of top 2" if "moe" in shape else ""
    head = ["layout", "s a step", "times DP2", "of it in collectives, waiting for peers included"]
    return (
        f"## {name}, {precision}\n\nwidth {shape['dim']}, {shape['n_layers']} layers{moe}, vocabulary "
        f"{shape['vocab_size']:,}; {BATCH} rows of {SEQ_LEN} tokens a step over two processes (gloo, one machine, one "
        f"thread each); AdamW, ZeRO-1; {rounds} rounds of {steps} steps\n\n{table(head, rows)}"
    )


def measure(model: dict[str, Any], layout: dict[str, Any], precision: str, steps: int) -> dict[str, float]:
    """Seconds of a step, and of them in collectives, of one job on two processes; the loss of its last step."""
    task = {"model": model, "layout": layout, "precision": precision, "steps": steps}
    return run_jobs(task | {"batch": BATCH, "micro_batches": 1, "seq_len": SEQ_LEN})[0]


def run_jobs(task: dict[str, Any], processes: int = 2, jobs: int = 1) -> list[dict[str, float]]:
    """What parallel_job.py measured of `task` on so many processes; with several jobs, of each of them side by side."""
    script = str(ROOT / "tools/benchmarks/parallel_job.py")
    launcher = [*local.command(processes), script]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "task.json"
        written.write_text(json.dumps(task))
        outs = [Path(folder) / f"out{number}.json" for number in range(jobs)]
        pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        running = [subprocess.Popen([*launcher, str(written), str(out)], env=environment, **pipes) for out in outs]
        for job in running:
            words = job.communicate()[1]
            if job.returncode != 0:
                raise UserError(f"{task['layout'] or 'DP2'}: a job ended with {job.returncode}: {words[-500:]}")
        return [json.loads(out.read_text()) for out in outs]


if __name__ == "__main__":
    run_cli(benchmark)
