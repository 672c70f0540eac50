"""A whole training step of this project against transformers' Llama of the same shape, and what DeepSpeed costs.

    python tools/benchmarks/step.py --case S --precision bf16       # one result file
    python tools/benchmarks/step.py --all                           # every case and precision, and the data wait

Case S is short texts and a small vocabulary, case V a vocabulary of 32,000, where the loss weighs most. The peer is the
fastest of all ways in which a user would run transformers: eager and compiled, and in bf16 with float32 weights
under autocast and with bf16 weights.
"""

import json
import os
import sys
from pathlib import Path
from typing import Literal

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from llm.cli import run_cli
from llm.errors import UserError
from llm.parallel import launch
from llm.parallel.launch import World
from tools.benchmarks.contestants import Shape, runners
from tools.benchmarks.data_wait import data_wait_section
from tools.benchmarks.harness import (
    RESULTS,
    Bar,
    Contestant,
    check_same_work,
    in_fresh_process,
    interleave,
    table,
    write_result,
)
from tools.benchmarks.memory import ENVIRONMENT, peak_above_states

Precision = Literal["fp32", "bf16"]
SHAPES = {"S": Shape(vocab=4096, batch=8, seq_len=256), "V": Shape(vocab=32000, batch=1, seq_len=2048)}
SPEED_BARS = {("S", "fp32"): 1.0, ("S", "bf16"): 1.1, ("V", "fp32"): 1.3, ("V", "bf16"): 1.3}
MEMORY_BAR = 0.6
SAME_LOSS = {"fp32": 1e-5, "bf16": 1e-2}
"""Relative agreement of the first step's loss: summation order; rounding of each layer's results to 8 bits."""
ENGINE, COMPILED, PLAIN = "ours", "ours compiled", "ours without DeepSpeed"
MIB = 2**20


def benchmark(
    case: Literal["S", "V"] = "S",
    precision: Precision = "fp32",
    rounds: int = 9,
    compiled: bool = True,
    all: bool = False,
    output: str = str(RESULTS),
) -> None:
    """Time training steps in turn with transformers and write a dated result file.

    case: S = vocabulary 4,096, batch 8 x 256; V = vocabulary 32,000, batch 1 x 2,048
    precision: arithmetic of both sides
    rounds: rounds that count, each a step of every contestant
    compiled: let the versions under torch.compile take part (up to a minute or two of compilation each)
    all: both cases in both precisions and the data wait of a real run, in one file
    output: folder of the result file
    """
    chosen: list[tuple[str, Precision]] = [(case, precision)]
    if all:
        chosen = [(name, kind) for name in SHAPES for kind in ("fp32", "bf16")]
    world = start()
    sections = [compare(name, kind, rounds, compiled, world) for name, kind in chosen]
    if all:
        sections.append(data_wait_section())
    name = "step" if all else f"step-{case}-{precision}"
    path = write_result(name, "Training step against transformers", sections, Path(output))
    print("\n\n".join(sections), f"\nwritten to {path}")


def memory(contestant: str, case: Literal["S", "V"] = "S", precision: Precision = "fp32") -> None:
    """Print, as one line of JSON, the bytes of one contestant's weights and optimizer and its peak above them.

    contestant: its name in a result file
    case: as above
    precision: as above
    """
    made = runners(precision)
    if contestant not in made:
        raise UserError(f"--contestant={contestant}: possible are {', '.join(made)}")
    runner = made[contestant](SHAPES[case], start())
    measured = peak_above_states(runner.step, runner.states)
    print(json.dumps({"states": measured.states, "peak": measured.peak}))


def start() -> World:
    """A world of this one process, on one thread."""
    launch.quiet_libraries()
    return launch.start(timeout_s=600.0, threads=1)


def compare(case: str, precision: Precision, rounds: int, compiled: bool, world: World) -> str:
    """One section of the result: speed, memory and what was expected."""
    shape = SHAPES[case]
    built = {
        name: build(shape, world) for name, build in runners(precision).items() if compiled or "compiled" not in name
    }
    check_same_work({name: runner.step() for name, runner in built.items()}, SAME_LOSS[precision])
    timing = interleave([Contestant(name, runner.step) for name, runner in built.items()], rounds=rounds)
    memories = {name: peak_memory(name, case, precision) for name in built}
    ours = timing.fastest([name for name in built if name in (ENGINE, COMPILED)])
    best = list(dict.fromkeys((ENGINE, ours)))
    peer = timing.fastest([name for name in built if name not in (ENGINE, COMPILED, PLAIN)])
    rows = [
        [
            name,
            timing.spread(name).text(),
            f"{shape.n_tokens / timing.spread(name).median:,.0f}",
            *(timing.speedup(mine, over=name).text() for mine in best),
            f"{memories[name]['states'] / MIB:,.0f}",
            f"{memories[name]['peak'] / MIB:,.0f}",
        ]
        for name in built
    ]
    bars = [
        Bar(f"speed of *{mine}* over it", timing.speedup(mine, peer).median, SPEED_BARS[case, precision])
        for mine in best
    ]
    if case == "V":
        share = memories[ours]["peak"] / memories[peer]["peak"]
        bars.append(Bar(f"peak of *{ours}* above model and optimizer over its", share, MEMORY_BAR, at_least=False))
    by_cpu = ", ".join(f"*{mine}* {timing.cpu_speedup(mine, peer).text()}" for mine in best)
    costs = [
        f"{100 * (ratio.median - 1):+.1f} % ({100 * (ratio.low - 1):+.1f} to {100 * (ratio.high - 1):+.1f})"
        for ratio in (timing.speedup(PLAIN, over=ENGINE), timing.cpu_speedup(PLAIN, over=ENGINE))
    ]
    head = ["contestant", "s a step", "tokens/s", *(f"speed of *{mine}* over it" for mine in best)]
    lines = [
        f"## Case {case}, {precision}",
        f"{shape.text()}; AdamW, clipping at 1, {rounds} rounds. The fastest peer is *{peer}*.",
        table([*head, "model and optimizer, MiB", "peak above them, MiB"], rows),
        "\n".join(f"* {bar.text()}" for bar in bars)
        + f"\n* the same ratios of CPU time, which leaves out waiting for a core: {by_cpu}"
        + f"\n* what DeepSpeed's engine adds to a plain loop's step: {costs[0]} of wall time, {costs[1]} of CPU time",
    ]
    return "\n\n".join(lines)


def peak_memory(name: str, case: str, precision: str) -> dict[str, int]:
    """`memory` of one contestant in a process of its own."""
    flags = [f"--contestant={name}", f"--case={case}", f"--precision={precision}"]
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    line = in_fresh_process([sys.executable, __file__, "memory", *flags], {**kept, **ENVIRONMENT})
    return {key: int(value) for key, value in json.loads(line).items()}


if __name__ == "__main__":
    run_cli(benchmark, memory=memory)
