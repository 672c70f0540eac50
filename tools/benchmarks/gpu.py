"""Training steps of a 1.3B Llama on one GPU, this project's and transformers': speed, utilisation, memory.

    python tools/benchmarks/gpu.py                     # 8 x 2,048 tokens a step, one result file
    python tools/benchmarks/gpu.py --seq_len 8192      # 2 x 8,192

Every contestant runs in a process of its own, one after the other, as no two fit into the memory of one GPU side by
side; where one does not fit alone, the table says so. Model FLOPs utilisation counts 6 N + 12 L d s a token (N without
the token table, L layers of width d, s the sequence length) against the dense bf16 peak of the maker's data sheet.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from llm.cli import run_cli
from llm.errors import UserError
from llm.flops import token_flops
from llm.parallel.launch import process
from llm.parallel.launch.world import World
from llm.train.peaks import peak_flops
from tools.benchmarks.contestants import Runner, Shape, our_engine, runners
from tools.benchmarks.harness import RESULTS, Spread, check_same_work, in_fresh_process, table, write_result
from tools.benchmarks.memory import storage_bytes

TOKENS = 16384
WARMUP = 4
SAME_LOSS = 1e-2
"""Relative agreement of the first step's loss: every layer's results are rounded to 8 bits."""
OURS, OURS_COMPILED = "ours", "ours compiled"
FAILED = "out of memory"


def shape_1b3(seq_len: int) -> Shape:
    """1,345 million parameters: GPT-3 XL's width, depth and heads (Brown et al. 2020) as a Llama."""
    if seq_len < 1 or TOKENS % seq_len:
        raise UserError(f"--seq_len={seq_len} does not divide the {TOKENS} tokens of a step")
    return Shape(
        vocab=32000,
        batch=TOKENS // seq_len,
        seq_len=seq_len,
        dim=2048,
        n_layers=24,
        n_heads=16,
        n_kv_heads=16,
        ffn=5504,
    )


def contestants() -> dict[str, Callable[[Shape, World], Runner]]:
    """How to build each, by name; ours first."""
    known = runners("bf16")
    ours = {name: known.pop(name) for name in (OURS, OURS_COMPILED, "ours without DeepSpeed")}
    for recompute in ("selective", "full"):
        build = partial(our_engine, precision="bf16", compiled=True, recompute=recompute)
        ours[f"ours compiled, {recompute} recomputation"] = build
    return {**ours, **known}


@dataclass(frozen=True)
class Measured:
    """Of one contestant; bytes of its weights, masters and moments, and the most that was allocated."""

    seconds: list[float]
    first_loss: float
    states: int
    peak: int


def benchmark(seq_len: int = 2048, steps: int = 20, only: str = "", output: str = str(RESULTS)) -> None:
    """Time training steps of each contestant on this GPU and write a dated result file.

    seq_len: tokens of a sequence; a step has 16,384 tokens
    steps: steps that count, of each contestant
    only: names of contestants, by semicolons; empty = all
    output: folder of the result file
    """
    if not torch.cuda.is_available():
        raise UserError("tools/benchmarks/gpu.py needs a CUDA device")
    names = [name.strip() for name in only.split(";")] if only else list(contestants())
    for name in names:
        _check_name(name)
    found = {name: _measured(name, seq_len, steps) for name in names}
    done = {name: measured for name, measured in found.items() if measured is not None}
    if done:
        check_same_work({name: measured.first_loss for name, measured in done.items()}, SAME_LOSS)
    section = report(shape_1b3(seq_len), found, steps, peak_flops(None, torch.device("cuda")))
    how = "Each contestant in a process of its own, one after the other, with nothing else on the GPU"
    path = write_result(f"gpu-1.3B-{seq_len}", "Training step on a GPU", [section], Path(output), how)
    print(f"{section}\n\nwritten to {path}")


def report(shape: Shape, found: dict[str, Measured | None], steps: int, peak: float | None) -> str:
    """The section of the result file; None was found of what ran out of memory. peak: FLOP/s of the GPU, if known."""
    flops = token_flops(shape.args(), shape.seq_len)
    ours = [name for name in found if name.startswith("ours") and found[name] is not None]
    best = min(ours, key=lambda name: _median(found[name]), default=None)
    rows = []
    for name, measured in found.items():
        if measured is None:
            rows.append([name, FAILED, "", "", "", "", ""])
            continue
        spread = Spread.of(measured.seconds)
        speed = shape.n_tokens / spread.median
        rows.append(
            [
                name,
                spread.text(4),
                f"{speed:,.0f}",
                "unknown" if peak is None else f"{speed * flops / peak:.3f}",
                "" if best is None else f"{spread.median / _median(found[best]):.3f}",
                f"{measured.states / 2**30:.1f}",
                f"{measured.peak / 2**30:.1f}",
            ]
        )
    head = ["contestant", "s a step", "tokens/s", "MFU", f"speed of *{best}* over it", "states, GiB", "peak, GiB"]
    named = "unknown" if peak is None else f"{peak / 1e12:.0f} TFLOP/s"
    return "\n\n".join(
        [
            f"## 1.3B, sequences of {shape.seq_len}",
            f"{shape.text()}; bf16, AdamW, clipping at 1; {steps} steps after {WARMUP}. MFU: {flops / 1e9:.2f} GFLOP "
            f"a token (6 N + 12 L d s), peak {named}. *states* are weights, float32 masters (ours) and moments; *peak* "
            f"is the most that was allocated at once.",
            table(head, rows),
        ]
    )


def measure(contestant: str, seq_len: int = 2048, steps: int = 20) -> None:
    """Print, as one line of JSON, what one contestant needs; `null` where it runs out of memory.

    contestant: its name in a result file
    seq_len: as above
    steps: as above
    """
    _check_name(contestant)
    process.quiet_libraries()
    world = process.start(timeout_s=600.0, threads=8)
    try:
        found: dict[str, Any] | None = _timed(contestants()[contestant](shape_1b3(seq_len), world), steps)
    except torch.cuda.OutOfMemoryError:
        found = None
    print(json.dumps(found))


def _timed(runner: Runner, steps: int) -> dict[str, Any]:
    first_loss = runner.step()
    for _ in range(WARMUP - 1):
        runner.step()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(steps):
        torch.cuda.synchronize()
        started = time.perf_counter()
        runner.step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return {
        "seconds": seconds,
        "first_loss": first_loss,
        "states": storage_bytes(runner.states()),
        "peak": torch.cuda.max_memory_allocated(),
    }


def _measured(name: str, seq_len: int, steps: int) -> Measured | None:
    flags = [f"--contestant={name}", f"--seq_len={seq_len}", f"--steps={steps}"]
    line = in_fresh_process([sys.executable, __file__, "measure", *flags], dict(os.environ))
    found = json.loads(line)
    print(f"{name}: {FAILED if found is None else statistics.median(found['seconds'])}", file=sys.stderr, flush=True)
    return None if found is None else Measured(**found)


def _median(measured: Measured | None) -> float:
    assert measured is not None
    return statistics.median(measured.seconds)


def _check_name(name: str) -> None:
    if name not in contestants():
        raise UserError(f"{name!r}: possible contestants are {', '.join(contestants())}")


if __name__ == "__main__":
    run_cli(benchmark, measure=measure)
