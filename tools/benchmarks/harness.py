"""Compare contestants on a machine that is never quite still: in turn, round after round.

In each round every contestant runs a short block of steps, the order turning round each time, so that a slow minute
of the machine falls on all of them. What is reported is the median of the per-round ratios with its quartiles, not a
ratio of two measurements made at different times.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Protocol

import torch

from llm.atomic import write_file
from llm.errors import UserError
from tools.benchmarks.machine import hardware, versions

RESULTS = Path(__file__).resolve().parent / "results"
MIN_ROUNDS = 7
"""Fewer give quartiles that mean nothing."""


class Timed(Protocol):
    """Something to be timed: in this process (`Contestant`) or in its own (own_process.py)."""

    @property
    def name(self) -> str:
        """As it is called in the result."""

    @property
    def step(self) -> Callable[[], float]:
        """Does the work once and returns a number (a loss) by which contestants are seen to do the same work."""

    def timed(self, block: int) -> tuple[float, float]:
        """Seconds of `block` steps, by the clock and of a core."""


@dataclass(frozen=True)
class Contestant:
    """Something to be timed in this process."""

    name: str
    step: Callable[[], float]

    def timed(self, block: int) -> tuple[float, float]:
        """Seconds of `block` steps, by the clock and of a core."""
        wait_for_device()
        started, cpu_started = time.perf_counter(), time.process_time()
        for _ in range(block):
            self.step()
        wait_for_device()
        return time.perf_counter() - started, time.process_time() - cpu_started


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a list of measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least two values."""
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def text(self, digits: int = 3) -> str:
        """`1.120 (1.101 to 1.138)`."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


@dataclass(frozen=True)
class Timing:
    """Seconds a step, of each contestant in each round; the lists are parallel.

    cpu_seconds is the time that the process had a core: on a crowded machine it leaves out the time in which others
    had it, and says whether a ratio of wall times was theirs.
    """

    seconds: dict[str, list[float]]
    cpu_seconds: dict[str, list[float]]

    def spread(self, name: str) -> Spread:
        """Seconds a step of one contestant."""
        return Spread.of(self.seconds[name])

    def speedup(self, name: str, over: str) -> Spread:
        """How many times faster `name` is than `over`: the per-round ratios of their times."""
        return _ratios(self.seconds[name], self.seconds[over])

    def cpu_speedup(self, name: str, over: str) -> Spread:
        """The same of CPU times; means nothing for work on a GPU."""
        return _ratios(self.cpu_seconds[name], self.cpu_seconds[over])

    def fastest(self, names: Sequence[str]) -> str:
        """The one with the smallest median."""
        return min(names, key=lambda name: self.spread(name).median)


def interleave(contestants: Sequence[Timed], *, rounds: int, block: int = 1, warmup: int = 2) -> Timing:
    """Time every contestant in each of `rounds` rounds of `block` steps, after `warmup` steps that do not count.

    One CPU thread: more would fight over cores with whatever else runs, and differ between libraries. Raises UserError
    on too few rounds.
    """
    if rounds < MIN_ROUNDS:
        raise UserError(f"--rounds={rounds}: at least {MIN_ROUNDS}, so that quartiles mean something")
    torch.set_num_threads(1)
    for contestant in contestants:
        for _ in range(warmup):
            contestant.step()
    timing = Timing({contestant.name: [] for contestant in contestants}, {c.name: [] for c in contestants})
    for number in range(rounds):
        for contestant in contestants if number % 2 == 0 else reversed(contestants):
            seconds, cpu_seconds = contestant.timed(block)
            timing.seconds[contestant.name].append(seconds / block)
            timing.cpu_seconds[contestant.name].append(cpu_seconds / block)
    return timing


def _ratios(times: Sequence[float], others: Sequence[float]) -> Spread:
    return Spread.of([other / own for own, other in zip(times, others, strict=True)])


def check_same_work(losses: dict[str, float], rtol: float) -> None:
    """Raise UserError naming the contestant whose loss is not the first one's, relative to `rtol`."""
    (first, expected), *others = losses.items()
    for name, loss in others:
        if not abs(loss - expected) <= rtol * abs(expected):
            raise UserError(f"{name} does other work than {first}: loss {loss:.6f} against {expected:.6f}")


@dataclass(frozen=True)
class Bar:
    """What was expected of a number, and what came."""

    what: str
    value: float
    bound: float
    at_least: bool = True

    def text(self) -> str:
        met = self.value >= self.bound if self.at_least else self.value <= self.bound
        return (
            f"{self.what}: expected {'>=' if self.at_least else '<='} {self.bound:g}, came {self.value:.3g}: "
            f"{'met' if met else 'NOT MET'}"
        )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


IN_TURNS = "Contestants took turns in one process with one thread"
IN_TURNS_APART = "Contestants took turns, each in a process of its own with one thread"


def write_result(name: str, title: str, sections: Sequence[str], folder: Path = RESULTS, how: str = IN_TURNS) -> Path:
    """Write `YYYY-MM-DD-NAME.md` with hardware, command, versions and `how` above the sections; returns its path."""
    today = date.today().isoformat()
    command = "python " + " ".join([_relative(sys.argv[0]), *sys.argv[1:]])
    head = [
        f"# {title}, {today}",
        f"Hardware: {hardware()}.\nVersions: {versions()}.\nCommand: `{command}`.",
        f"{how}; medians over rounds, quartiles in brackets.",
    ]
    path = folder / f"{today}-{name}.md"
    folder.mkdir(parents=True, exist_ok=True)
    write_file(path, ("\n\n".join([*head, *sections]) + "\n").encode())
    return path


def in_fresh_process(command: Sequence[str], environment: dict[str, str]) -> str:
    """Run `command` with `environment` to its end; its last line on stdout. UserError with its last words if it
    fails.
    """
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise UserError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout.strip().splitlines()[-1]


def _relative(script: str) -> str:
    root, path = RESULTS.parents[2], Path(script).resolve()
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def wait_for_device() -> None:
    """Until a GPU, where there is one, has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
