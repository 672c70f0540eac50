"""A whole training step of this project against transformers' Llama of the same shape, and what DeepSpeed costs.

    python tools/benchmarks/step.py --case S --precision bf16       # one result file
    python tools/benchmarks/step.py --all                           # every case and precision, and the data wait

Case S is short texts and a small vocabulary, case V a vocabulary of 32,000, where the loss weighs most. The peer is the
fastest of all ways in which a user would run transformers: eager and compiled, and in bf16 with float32 weights
under autocast and with bf16 weights. Each contestant has a process of its own, ours with the setting of malloc that
launch/pretrain.py makes; `--keep_memory=all` gives it to the peers, too, and `none` to nobody.
"""

import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from llm.cli import run_cli
from llm.environment import alone
from llm.errors import UserError
from llm.malloc import keep_freed
from llm.parallel.launch import process
from llm.parallel.launch.world import World
from tools.benchmarks.contestants import Runner, Shape, runners
from tools.benchmarks.data_wait import data_wait_section
from tools.benchmarks.harness import (
    IN_TURNS_APART,
    RESULTS,
    Bar,
    check_same_work,
    in_fresh_process,
    interleave,
    table,
    write_result,
)
from tools.benchmarks.memory import ENVIRONMENT, peak_above_states
from tools.benchmarks.own_process import OwnProcess, serve

Precision = Literal["fp32", "bf16"]
Keepers = Literal["ours", "all", "none"]
SHAPES = {"S": Shape(vocab=4096, batch=8, seq_len=256), "V": Shape(vocab=32000, batch=1, seq_len=2048)}
SPEED_BARS = {("S", "fp32"): 1.0, ("S", "bf16"): 1.1, ("V", "fp32"): 1.3, ("V", "bf16"): 1.3}
MEMORY_BAR = 0.6
SAME_LOSS = {"fp32": 1e-5, "bf16": 1e-2}
"""Relative agreement of the first step's loss: summation order; rounding of each layer's results to 8 bits."""
OURS = ENGINE, COMPILED, PLAIN = "ours", "ours compiled", "ours without DeepSpeed"
KEEPING = {
    "ours": "Ours keep memory that they free, as launch/pretrain.py does; the peers leave malloc as it is.",
    "all": "All keep memory that they free.",
    "none": "All leave malloc as it is.",
}
MIB = 2**20


def benchmark(
    case: Literal["S", "V"] = "S",
    precision: Precision = "fp32",
    rounds: int = 9,
    compiled: bool = True,
    all: bool = False,
    keep_memory: Keepers = "ours",
    output: str = str(RESULTS),
) -> None:
    """Time training steps in turn with transformers and write a dated result file.

    case: S = vocabulary 4,096, batch 8 x 256; V = vocabulary 32,000, batch 1 x 2,048
    precision: arithmetic of both sides
    rounds: rounds that count, each a step of every contestant
    compiled: let the versions under torch.compile take part (up to a minute or two of compilation each)
    all: both cases in both precisions and the data wait of a real run, in one file
    keep_memory: whose processes keep memory that they free, as launch/pretrain.py does
    output: folder of the result file
    """
    chosen: list[tuple[str, Precision]] = [(case, precision)]
    if all:
        chosen = [(name, kind) for name in SHAPES for kind in ("fp32", "bf16")]
    sections = [compare(name, kind, rounds, compiled, keep_memory) for name, kind in chosen]
    if all:
        sections.append(data_wait_section())
    name = "step" if all else f"step-{case}-{precision}"
    name += "" if keep_memory == "ours" else f"-memory-kept-by-{keep_memory}"
    path = write_result(name, "Training step against transformers", sections, Path(output), IN_TURNS_APART)
    print("\n\n".join(sections), f"\nwritten to {path}")


def memory(contestant: str, case: Literal["S", "V"] = "S", precision: Precision = "fp32") -> None:
    """Print, as one line of JSON, the bytes of one contestant's weights and optimizer and its peak above them.

    contestant: its name in a result file
    case: as above
    precision: as above
    """
    runner = build(contestant, case, precision)
    measured = peak_above_states(runner.step, runner.states)
    print(json.dumps({"states": measured.states, "peak": measured.peak}))


def steps(
    contestant: str, case: Literal["S", "V"] = "S", precision: Precision = "fp32", keep_memory: bool = False
) -> None:
    """Make steps of one contestant as stdin asks for them (own_process.py).

    contestant: its name in a result file
    case: as above
    precision: as above
    keep_memory: keep memory that is freed
    """
    if keep_memory:
        keep_freed()
    serve(lambda: build(contestant, case, precision).step)


def build(contestant: str, case: str, precision: Precision) -> Runner:
    """One contestant, by its name."""
    made = runners(precision)
    if contestant not in made:
        raise UserError(f"--contestant={contestant}: possible are {', '.join(made)}")
    return made[contestant](SHAPES[case], start())


def start() -> World:
    """A world of this one process, on one thread."""
    process.quiet_libraries()
    return process.start(timeout_s=600.0, threads=1)


def compare(case: str, precision: Precision, rounds: int, compiled: bool, keep_memory: Keepers) -> str:
    """One section of the result: speed, memory and what was expected."""
    shape = SHAPES[case]
    names = [name for name in runners(precision) if compiled or "compiled" not in name]
    keepers = {"ours": OURS, "all": names, "none": ()}[keep_memory]
    with ExitStack() as ends:
        contestants = [
            ends.enter_context(
                OwnProcess(name, command("steps", name, case, precision, name in keepers), environment())
            )
            for name in names
        ]
        check_same_work({contestant.name: contestant.step() for contestant in contestants}, SAME_LOSS[precision])
        timing = interleave(contestants, rounds=rounds)
    memories = {name: peak_memory(name, case, precision) for name in names}
    ours = timing.fastest([name for name in names if name in (ENGINE, COMPILED)])
    best = list(dict.fromkeys((ENGINE, ours)))
    peer = timing.fastest([name for name in names if name not in OURS])
    rows = [
        [
            name,
            timing.spread(name).text(),
            f"{shape.n_tokens / timing.spread(name).median:,.0f}",
            *(timing.speedup(mine, over=name).text() for mine in best),
            f"{memories[name]['states'] / MIB:,.0f}",
            f"{memories[name]['peak'] / MIB:,.0f}",
        ]
        for name in names
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
        f"{shape.text()}; AdamW, clipping at 1, {rounds} rounds. The fastest peer is *{peer}*. {KEEPING[keep_memory]}",
        table([*head, "model and optimizer, MiB", "peak above them, MiB"], rows),
        "\n".join(f"* {bar.text()}" for bar in bars)
        + f"\n* the same ratios of CPU time, which leaves out waiting for a core: {by_cpu}"
        + f"\n* what DeepSpeed's engine adds to a plain loop's step: {costs[0]} of wall time, {costs[1]} of CPU time",
    ]
    return "\n\n".join(lines)


def peak_memory(name: str, case: str, precision: str) -> dict[str, int]:
    """`memory` of one contestant in a process of its own."""
    line = in_fresh_process(command("memory", name, case, precision), environment() | ENVIRONMENT)
    return {key: int(value) for key, value in json.loads(line).items()}


def command(what: str, name: str, case: str, precision: str, keep_memory: bool = False) -> list[str]:
    """One of this file's other jobs, for one contestant."""
    flags = [f"--contestant={name}", f"--case={case}", f"--precision={precision}"]
    return [sys.executable, __file__, what, *flags, *(["--keep_memory"] if keep_memory else [])]


def environment() -> dict[str, str]:
    """Of a process that is a world of its own."""
    return alone()


if __name__ == "__main__":
    run_cli(benchmark, memory=memory, steps=steps)
