"""The mixture-of-experts layer, forward and backward, against those of transformers with every way in which they
evaluate experts; and what more experts cost when a token visits as many as before.

    python tools/benchmarks/moe.py                                            # one result file
    python tools/benchmarks/moe.py --family mixtral --precision bf16          # a part

Every step brings other tokens, as in training, so experts get other numbers of rows each time. Gradients of the input
and of all weights are made anew in each step.
"""

import os
import sys
import time
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Literal

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor

from llm.cli import run_cli
from llm.errors import UserError
from llm.malloc import keep_freed
from tools.benchmarks.contestants import DTYPES
from tools.benchmarks.harness import MIN_ROUNDS, RESULTS, Bar, Contestant, Timing, interleave, table, write_result
from tools.benchmarks.moe_layers import FAMILIES, Build, Family, Layer, LayerShape, Problem, our_layer, peers

Precision = Literal["fp32", "bf16"]
FEW, MANY = 16, 64
SPEED_BAR, GROWTH_BAR = 1.0, 1.3
SAME = {"fp32": 1e-5, "bf16": 2e-2}
"""Norm of the difference of a result over the norm of ours: order of sums; 8 bits at each of a dozen operations."""
SAME_ONE_BY_ONE = {"fp32": 1e-5, "bf16": 4e-2}
"""The same of batched_mm, which adds the gradients of an expert's n pairs one after the other in the weights'
precision: about sqrt(n / 3) roundings, of 2**-9 in bf16, so 2.6e-2 with n = 512 (2.4e-2 came)."""
N_BATCHES = 8
SLOW = 4.0
"""A peer this many times slower than ours in its second step is timed in that step only."""
OURS = "ours"
GIB = 2**30


@dataclass(frozen=True)
class Entry:
    """One contestant at one number of experts."""

    name: str
    n_experts: int
    layer: Layer
    problem: Problem

    @property
    def key(self) -> str:
        return entry_key(self.name, self.n_experts)

    def contestant(self) -> Contestant:
        batches = cycle(self.problem.batches)
        return Contestant(self.key, lambda: float(self.layer.run(next(batches))[0].flatten()[0]))

    def seconds_once(self) -> float:
        """Of a second step."""
        step = self.contestant().step
        step()
        started = time.perf_counter()
        step()
        return time.perf_counter() - started


def benchmark(
    family: Literal["llama4", "mixtral", "all"] = "all",
    precision: Literal["fp32", "bf16", "all"] = "all",
    rounds: int = 9,
    tokens: int = 4096,
    keep_memory: bool = True,
    output: str = str(RESULTS),
) -> None:
    """Time the layer in turn with transformers' at 16 and 64 experts and write a dated result file.

    family: llama4 = sigmoid, top 1, weights on inputs, a shared expert; mixtral = softmax, top 2, weights on outputs
    precision: of weights and activations on both sides
    rounds: rounds that count, each a step of every contestant
    tokens: tokens of a step
    keep_memory: freed memory stays with the process, as launch/pretrain.py has it, for all contestants
    output: folder of the result file
    """
    if rounds < MIN_ROUNDS:
        raise UserError(f"--rounds={rounds}: at least {MIN_ROUNDS}, so that quartiles mean something")
    if tokens < 1:
        raise UserError(f"--tokens={tokens}: at least 1")
    if keep_memory:
        keep_freed()
    torch.set_num_threads(1)
    families: list[Family] = list(FAMILIES) if family == "all" else [family]
    precisions: list[Precision] = ["fp32", "bf16"] if precision == "all" else [precision]
    sections = [compare(name, kind, rounds, tokens) for name in families for kind in precisions]
    name = f"moe-{family}-{precision}" + ("" if keep_memory else "-memory-given-back")
    path = write_result(name, "Mixture-of-experts layer against transformers", sections, Path(output))
    print("\n\n".join(sections), f"\nwritten to {path}")


def compare(family: Family, precision: Precision, rounds: int, tokens: int) -> str:
    """One section of the result: all contestants with few and with many experts, in turn."""
    entries: list[Entry] = []
    absent: dict[str, str] = {}
    once: dict[str, float] = {}
    for n_experts in (FEW, MANY):
        shape = LayerShape(family, n_experts, tokens)
        problem = Problem.make(shape, precision, N_BATCHES)
        ours = Entry(OURS, n_experts, our_layer(shape, problem.weights), problem)
        entries.append(ours)
        limit, expected = SLOW * ours.seconds_once(), ours.layer.results(problem.batches[0])
        for name, build in peers(family).items():
            same = SAME_ONE_BY_ONE if "batched_mm" in name else SAME
            entry = prepare(name, build, shape, problem, expected, same[precision])
            if isinstance(entry, str):
                absent[entry_key(name, n_experts)] = entry
            elif (seconds := entry.seconds_once()) > limit:
                once[entry.key] = seconds
            else:
                entries.append(entry)
    timing = interleave([entry.contestant() for entry in entries], rounds=rounds)
    return section(family, precision, rounds, tokens, timing, once, absent)


def prepare(
    name: str, build: Build, shape: LayerShape, problem: Problem, expected: dict[str, Tensor], rtol: float
) -> Entry | str:
    """A peer that does the same work, or why it cannot run here. UserError where it does other work."""
    needed = memory_needed(name, shape, problem.weights["router.weight"].dtype)
    if needed > (free := free_memory()):
        return f"needs {needed / GIB:.0f} GiB of memory, {free / GIB:.0f} are free"
    layer = build(shape, problem.weights)
    try:
        found = layer.results(problem.batches[0])
    except (ImportError, ValueError, NotImplementedError) as error:  # what transformers raises for a missing kernel
        return " ".join(str(error).split())
    check_same_results(f"{name} with {shape.n_experts} experts", found, expected, rtol)
    return Entry(name, shape.n_experts, layer, problem)


def check_same_results(name: str, found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float) -> None:
    """UserError naming the output or gradient that is not ours."""
    if found.keys() != expected.keys():
        raise UserError(f"{name} has other gradients than ours: {sorted(found.keys() ^ expected.keys())}")
    for what, tensor in expected.items():
        error = float((found[what].float() - tensor.float()).norm() / tensor.float().norm())
        if not error <= rtol:
            raise UserError(f"{name} does other work than ours: {what} differs by {error:.1e} of its norm")


def memory_needed(name: str, shape: LayerShape, dtype: torch.dtype) -> float:
    """Bytes of a step that a peer may not be given on a small machine: batched_mm copies the weights of its expert for
    every (token, choice) pair, and has at its peak 4/3 of that copy in weights and gradients.
    """
    copied = shape.n_pairs * 3 * shape.dim * shape.hidden * dtype.itemsize
    return 1.5 * copied if "batched_mm" in name else 0.0


def free_memory() -> int:
    """Bytes that the machine could give now."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def entry_key(name: str, n_experts: int) -> str:
    return f"{name}, {n_experts} experts"


def section(
    family: Family,
    precision: Precision,
    rounds: int,
    tokens: int,
    timing: Timing,
    once: dict[str, float],
    absent: dict[str, str],
) -> str:
    """Markdown of one family and precision."""
    shape = LayerShape(family, MANY, tokens)
    rows, bars = [], []
    for n_experts in (FEW, MANY):
        ours = entry_key(OURS, n_experts)
        names = [OURS, *peers(family)]
        timed = [key for name in names if (key := entry_key(name, n_experts)) in timing.seconds]
        for key in timed:
            rows.append([key, f"{1e3 * timing.spread(key).median:.1f}", timing.speedup(ours, over=key).text()])
        slow = {key: once[key] for name in names if (key := entry_key(name, n_experts)) in once}
        own = timing.spread(ours).median
        rows += [[key, f"{1e3 * seconds:.0f} (once)", f"{seconds / own:.1f}"] for key, seconds in slow.items()]
        if rivals := timed[1:]:
            best = timing.fastest(rivals)
            speed, cpu = timing.speedup(ours, best), timing.cpu_speedup(ours, best)
            what = f"speed of *{ours}* over *{best}* (of CPU time {cpu.text()})"
            bars.append(Bar(what, speed.median, SPEED_BAR).text())
        elif slow:
            best = min(slow, key=lambda key: slow[key])
            bars.append(Bar(f"speed of *{ours}* over *{best}*", slow[best] / own, SPEED_BAR).text())
    for name in [OURS, *peers(family)]:
        few, many = entry_key(name, FEW), entry_key(name, MANY)
        if few in timing.seconds and many in timing.seconds:
            growth, cpu = timing.speedup(few, over=many), timing.cpu_speedup(few, over=many)
            what = f"time of {MANY} over {FEW} experts, *{name}*"
            if name == OURS:
                bars.append(Bar(f"{what} (of CPU time {cpu.text()})", growth.median, GROWTH_BAR, False).text())
            else:
                bars.append(f"{what}: {growth.text()} (of CPU time {cpu.text()})")
    left_out = [f"{key}: {why}" for key, why in absent.items()]
    head = ["contestant", "ms a step", "speed of ours over it"]
    lines = [
        f"## {family}, {precision}",
        f"{tokens:,} tokens, width {shape.dim}, expert width {shape.hidden}, top {shape.moe.top_k}, {shape.moe.score}, "
        f"weights on {shape.moe.apply}s, {'a' if shape.moe.shared else 'no'} shared expert; {rounds} rounds, "
        f"{DTYPES[precision]}. Outputs and all gradients agree with ours within {SAME[precision]:g} of their norm.",
        table(head, rows),
        "\n".join(f"* {bar}" for bar in bars),
    ]
    if left_out:
        lines.append("Not run here:\n\n" + "\n".join(f"* {line}" for line in left_out))
    return "\n\n".join(lines)


if __name__ == "__main__":
    run_cli(benchmark)
