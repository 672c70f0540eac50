"""Is a run that is killed the run that nobody touched? `python tools/campaign.py --config C --nproc 4 --kills 30` shows
it for a run config: the first steps of a run are trained twice, once undisturbed, and once under SIGKILLs.

Kills come by progress, not by the clock: at a step, a byte of a file, between two lines of a commit. Each takes one
rank, torchrun alone, or all at once, and the run comes back by `torchrun --max-restarts` or by the same command. After
each kill every checkpoint that is listed is read in full; the run must go on from the newest of them; every row of
metrics.jsonl, the repeated ones too, must be bitwise the untouched run's, as must be all checkpoints in the end; no
process and no file may be left over. Exit status 0: all of that holds; 1: something does not; 2: bad input.

Any key of the run config can be given as in launch/pretrain.py (--section.key=value).
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import llm.installed  # noqa: F401  (says in one line what is missing)

import torch

from llm.atomic import write_file
from llm.checkpoint.inspect import damaged_blocks, survey
from llm.checkpoint.reader import list_steps
from llm.cli import HELP, describe, run_or_stop
from llm.data.sources import check_data
from llm.errors import UserError
from llm.parallel.launch import local
from llm.tokenizer import load_tokenizer
from llm.train.config import check_layout, load_config
from llm.train.config.yaml_file import read_yaml
from tools.campaign_job import (
    FIRST,
    MARK,
    PRETRAIN,
    Kill,
    events_file,
    kill_process,
    processes,
    task_file,
    task_text,
)
from tools.campaign_plan import PLACES, Settings, overrides, parse, plan
from tools.diff import TIMING, read_rows
from tools.layouts import failure

JOB = Path(__file__).with_name("campaign_job.py")
Row = dict[str, Any]


GONE_S = 45.0
"""In which the peers of a killed rank must be gone; torchrun gives them 30 s from its SIGTERM on."""
AT_ONCE_S = 10.0
"""The same where torchrun itself was killed: they die by the kernel."""
SILENCE_S = 180.0
"""Above the run's own time-out: an attempt that reports nothing for so long hangs."""


class Campaign:
    """Two runs of one config in `folder`: `untouched` and `killed`."""

    def __init__(self, settings: Settings, changed: dict[str, Any], timeout_s: float, folder: Path) -> None:
        """changed: keys of the config with other values. timeout_s: of the run's own collectives."""
        self.settings = settings
        self.folder = folder.absolute()
        self.untouched, self.killed = self.folder / "untouched", self.folder / "killed"
        self._changed = dict(changed)
        self._silence_s = timeout_s + SILENCE_S
        self._launcher: subprocess.Popen[bytes] | None = None
        self._log = self.folder / "untouched.txt"

    def __enter__(self) -> "Campaign":
        return self

    def __exit__(self, *_: Any) -> None:
        """End whatever still runs."""
        deadline = time.monotonic() + GONE_S
        while (left := processes(self.folder)) and time.monotonic() < deadline:
            for process in left:
                kill_process(process.pid)
            time.sleep(0.05)
        if self._launcher:
            self._launcher.wait()

    def train_untouched(self) -> dict[int, str]:
        """Train without a kill; what its metrics say by step. UserError with the reason where it fails."""
        self._launch([str(PRETRAIN)], self.untouched, 0, 0)
        assert self._launcher is not None
        status = self._launcher.wait()
        if status:
            raise UserError(f"{self.settings.config}: the untouched run failed: {failure(self._log, status)}")
        # of "auto", what was faster: another measurement might say otherwise
        self._changed["train.precision"] = read_yaml(self.untouched / "config.yaml")["train"]["precision"]
        return comparable(self.untouched)

    def _launch(self, script: list[str], run_dir: Path, first: int, max_restarts: int) -> None:
        self._log = self.folder / f"{run_dir.name}_{first}.txt"
        torchrun = local.command(self.settings.nproc, max_restarts)
        words = [f"--config={self.settings.config}", f"--run_dir={run_dir}"]
        words += [f"--{key}={json.dumps(value)}" for key, value in self._changed.items()]
        with self._log.open("wb") as log:
            self._launcher = subprocess.Popen(
                [*torchrun, *script, *words],
                env={"OMP_NUM_THREADS": "1", **os.environ, MARK: str(self.folder), FIRST: str(first)},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that Ctrl-C is heard here alone
            )

    def attempt(self, number: int, kills: Sequence[Kill]) -> str | None:
        """Give an attempt its kill, if there is one left, and wait until it is over; what went wrong, if anything.

        Starts a launcher where none is to bring the run back.
        """
        kill = kills[number] if number < len(kills) else None
        if number == 0 or kills[number - 1].restart == "command":
            following = [k.restart == "torchrun" for k in kills[number:]] + [False]
            self._launch([str(JOB), str(self.folder)], self.killed, number, following.index(False))
        write_file(task_file(self.folder, number), task_text(kill).encode())
        return self._finished() if kill is None else self._struck(number, kill)

    def _finished(self) -> str | None:
        assert self._launcher is not None
        heard = time.monotonic()
        rows = -1
        while (status := self._launcher.poll()) is None:
            if (now := size_of(self.killed / "metrics.jsonl")) != rows:
                rows, heard = now, time.monotonic()
            if time.monotonic() - heard > self._silence_s:
                return f"no step for {self._silence_s:.0f} s; see {self._log}"
            time.sleep(0.05)
        return f"the last attempt failed: {failure(self._log, status)}; see {self._log}" if status else None

    def _struck(self, number: int, kill: Kill) -> str | None:
        """Wait for the kill, and then for the end of what it leaves of the attempt."""
        assert self._launcher is not None
        heard, rows = time.monotonic(), -1
        while self.event(number, "strike") is None:
            if self._launcher.poll() is not None and self.event(number, "strike") is None:
                return f"ended without the kill: {failure(self._log, self._launcher.returncode)}; see {self._log}"
            if any((p.attempt or 0) > number for p in processes(self.folder)):
                return f"failed without the kill: {failure(self._log, 1)}; see {self._log}"
            if (now := size_of(self.killed / "metrics.jsonl")) != rows:
                rows, heard = now, time.monotonic()
            if time.monotonic() - heard > self._silence_s:
                return f"no step for {self._silence_s:.0f} s; see {self._log}"
            time.sleep(0.02)
        deadline = time.monotonic() + (GONE_S if kill.who == "rank" else AT_ONCE_S)
        while left := self._left(number, kill):
            if time.monotonic() > deadline:
                for pid in left:
                    kill_process(pid)
                return f"left behind: process(es) {', '.join(map(str, left))}"
            time.sleep(0.02)
        return None

    def _left(self, number: int, kill: Kill) -> list[int]:
        """Processes that a kill should have ended."""
        assert self._launcher is not None
        self._launcher.poll()  # so that it is no zombie
        running = processes(self.folder)
        by_command = kill.restart == "command"
        return [p.pid for p in running if by_command or (p.attempt is not None and p.attempt <= number)]

    def event(self, number: int, name: str) -> Row | None:
        """What a rank reported of an attempt, the first one that did."""
        for rank in range(self.settings.nproc):
            file = events_file(self.folder, number, rank)
            for line in file.read_text().split("\n")[:-1] if file.exists() else []:
                event: Row = json.loads(line)
                if event["event"] == name:
                    return event
        return None


@dataclass
class Outcome:
    """What became of a kill. `faults` are lines; what the next attempt reports is added when that is over."""

    kill: Kill
    step: int = 0
    recorded: int = 0
    """Last step in metrics.jsonl, of this attempt or one before."""
    committed: int = 0
    """Step of the newest checkpoint; 0 without any."""
    checkpoints: int = 0
    """That were listed, and read in full."""
    lost: int = 0
    """Steps that this attempt had made beyond it."""
    replayed: int = 0
    """Steps that the next attempt made once more."""
    resumed: int | None = None
    """Step from which the next attempt went on; None where it was killed earlier."""
    seconds: float | None = None
    """From the kill to the end of the first step after it."""
    faults: list[str] = field(default_factory=list)


HEADINGS = "  #  place       rank   step  killed    back by   committed  lost  replayed  resumed  recovered  verdict"


def line(number: int, outcome: Outcome) -> str:
    """A row of the table."""
    kill = outcome.kill
    resumed = "-" if outcome.resumed is None else str(outcome.resumed)
    seconds = "-" if outcome.seconds is None else f"{outcome.seconds:.1f} s"
    return (
        f"{number:3}  {kill.place:10}  {kill.rank:4}  {outcome.step or '-':>5}  {kill.who:8}  {kill.restart:8}  "
        f"{outcome.committed:9}  {outcome.lost:4}  {outcome.replayed:8}  {resumed:>7}  {seconds:>9}  "
        f"{'; '.join(outcome.faults) or 'equal'}"
    )


def comparable(run_dir: Path) -> dict[int, str]:
    """The rows of a run's metrics by step, less what depends on the clock, as text: equal where they are bitwise."""
    file = run_dir / "metrics.jsonl"
    rows = read_rows(file, []) if file.exists() else []
    return {row["step"]: json.dumps({k: v for k, v in row.items() if k == "step" or k not in TIMING}) for row in rows}


def parted(found: dict[int, str], expected: dict[int, str]) -> Iterator[str]:
    """A line for the first step that is not the untouched run's, and one for a gap."""
    if list(found) != list(range(1, len(found) + 1)):
        yield "metrics.jsonl misses or repeats a step"
    differing = [step for step, row in found.items() if row != expected.get(step)]
    if differing:
        yield f"step {differing[0]} differs from the untouched run's ({len(differing)} of {len(found)} steps do)"


def unsound(run_dir: Path) -> Iterator[str]:
    """A line for each checkpoint that is listed and not whole, with every block read."""
    for _, path in list_steps(run_dir / "checkpoints"):
        found = survey(path)
        faults = found.faults + [f"{d.file}: {d.reason}" for d in damaged_blocks(found)]
        if faults:
            yield f"{path.name}: {faults[0]}"


def looked_at(campaign: Campaign, number: int, kill: Kill, expected: dict[int, str], before: Outcome | None) -> Outcome:
    """What a kill left in the run folder. `before` is the outcome of the kill before this one."""
    found = comparable(campaign.killed)
    steps = list_steps(campaign.killed / "checkpoints")
    newest = steps[0][0] if steps else 0
    outcome = Outcome(kill, recorded=max(found, default=0), committed=newest, checkpoints=len(steps))
    outcome.faults += [*unsound(campaign.killed), *parted(found, expected)]
    strike, trained = campaign.event(number, "strike"), campaign.event(number, "trained")
    assert strike is not None
    outcome.step = strike["step"]
    past = 0 if before is None else before.recorded
    if trained is not None:
        outcome.lost = max(outcome.recorded - outcome.committed, 0)
        outcome.recorded = max(outcome.recorded, past)
    if before is not None and outcome.committed < before.committed:
        outcome.faults.append(f"the checkpoint of step {before.committed} is gone")
    if (run_file := campaign.killed / "metrics.jsonl").exists():
        shutil.copy(run_file, campaign.folder / f"metrics_{number}.jsonl")
    return outcome


def complete(campaign: Campaign, number: int, outcome: Outcome) -> None:
    """Add what the attempt after kill `number` reports: where it went on, when, and how far."""
    resumed, trained = campaign.event(number + 1, "resumed"), campaign.event(number + 1, "trained")
    strike = campaign.event(number, "strike")
    if resumed is not None:
        outcome.resumed = resumed["step"]
        if outcome.resumed != outcome.committed:
            outcome.faults.append(f"resumed from step {outcome.resumed}, not {outcome.committed}")
    if trained is not None and strike is not None:
        outcome.seconds = trained["time"] - strike["time"]
        last = min(max(comparable(campaign.killed), default=0), outcome.recorded)
        outcome.replayed = max(last - trained["step"] + 1, 0)


def differing_files(untouched: Path, killed: Path) -> Iterator[str]:
    """A line for each file that only one of the runs has, or whose bytes differ in a checkpoint. TensorBoard's curves
    are one file an attempt."""
    names = [
        {str(path.relative_to(run)) for path in run.rglob("*") if path.relative_to(run).parts[0] != "tb"}
        for run in (untouched, killed)
    ]
    for name in sorted(names[1] - names[0]):
        yield f"left over: {name}"
    for name in sorted(names[0] - names[1]):
        yield f"missing: {name}"
    for name in sorted(names[0] & names[1]):
        a, b = untouched / name, killed / name
        if name.startswith("checkpoints/") and a.is_file() and a.read_bytes() != b.read_bytes():
            yield f"differs: {name}"


def run_campaign(campaign: Campaign, kills: Sequence[Kill], report: "Report") -> bool:
    """Train both runs and print the table; whether all is as it should be."""
    expected = campaign.train_untouched()
    report.say(f"untouched: {len(expected)} steps, {len(list_steps(campaign.untouched / 'checkpoints'))} checkpoints")
    report.say(HEADINGS)
    outcomes: list[Outcome] = []
    faults: list[str] = []
    for number in range(len(kills) + 1):
        wrong = campaign.attempt(number, kills)
        if outcomes:
            complete(campaign, number - 1, outcomes[-1])
            report.say(line(number, outcomes[-1]))
        if number == len(kills) or campaign.event(number, "strike") is None:
            faults += [wrong] if wrong else []
            break
        outcomes.append(looked_at(campaign, number, kills[number], expected, outcomes[-1] if outcomes else None))
        outcomes[-1].faults += [wrong] if wrong else []
    replayed = sum(outcome.replayed for outcome in outcomes)
    if not faults:
        found = comparable(campaign.killed)
        faults += parted(found, expected)
        faults += [f"{len(found)} of {len(expected)} steps"] if len(found) != len(expected) else []
        faults += differing_files(campaign.untouched, campaign.killed)
        faults += [f"left behind: process {process.pid}" for process in processes(campaign.folder)]
    seconds = sorted(outcome.seconds for outcome in outcomes if outcome.seconds is not None)
    good = sum(not outcome.faults for outcome in outcomes)
    report.say(f"{good} of {len(kills)} kills recovered as they should; {counted(k.place for k in kills)}")
    report.say(
        f"{sum(outcome.lost for outcome in outcomes)} steps lost, {replayed} made again and compared; "
        f"{sum(outcome.checkpoints for outcome in outcomes)} checkpoints read in full after a kill; "
        + (f"back in {seconds[len(seconds) // 2]:.1f} s (median), at most {seconds[-1]:.1f} s" if seconds else "")
    )
    for fault in faults:
        report.say(f"at the end: {fault}")
    ok = not faults and good == len(kills)
    same = "all rows and every file of every checkpoint, bit by bit"
    report.say(f"EQUAL: {same}" if ok else "NOT EQUAL to the run that nobody touched")
    return ok


def counted(names: Iterator[str]) -> str:
    """How often each name comes, in words."""
    return ", ".join(f"{name} {n}" for name, n in sorted(Counter(names).items()))


class Report:
    """Lines for the screen, and for a file in the end."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def say(self, text: str) -> None:
        """Print a line."""
        self._lines.append(text)
        print(text, flush=True)

    def write(self, path: Path) -> None:
        """All lines so far, as a file."""
        write_file(path, ("\n".join(self._lines) + "\n").encode())


def size_of(path: Path) -> int:
    """Bytes of a file; 0 while it is not there."""
    return path.stat().st_size if path.exists() else 0


def main(words: Sequence[str]) -> None:
    """Check everything, then run the campaign; SystemExit(1) where something differs."""
    if any(word in HELP for word in words):
        print(describe(Settings) + "\n  --section.key=value: any key of the run config, as in launch/pretrain.py")
        return
    settings, flags = parse(words)
    settings.check()
    changed = overrides(settings, flags)
    config = load_config(settings.config, changed)
    layout = check_layout(config, settings.nproc)
    check_data(config.data.train)
    load_tokenizer(config.tokenizer)
    kills = plan(settings, config)
    report = Report()
    report.say(time.strftime("%Y-%m-%d %H:%M %z: ") + f"python tools/campaign.py {' '.join(words)}")
    report.say(f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores, {layout}")
    left_out = [name for name in PLACES if name not in {kill.place for kill in kills}]
    report.say(
        f"{settings.length()} steps, a checkpoint every {settings.interval}; {settings.kills} SIGKILLs, seed "
        f"{settings.seed}; left out: {', '.join(left_out) or 'no place'}"
    )
    if settings.keep_dir is None:
        folder = Path(tempfile.mkdtemp(prefix="campaign"))
    else:
        folder = Path(settings.keep_dir)
        folder.mkdir(parents=True)
    ok = False
    try:
        with Campaign(settings, changed, config.parallel.timeout_s, folder) as campaign:
            ok = run_campaign(campaign, kills, report)
    finally:
        if ok and settings.keep_dir is None:
            shutil.rmtree(folder)
        else:
            report.say(f"both runs, what the jobs printed and the rows after each kill: {folder}")
        if settings.out is not None:
            report.write(Path(settings.out))
    if not ok:
        raise SystemExit(1)


if __name__ == "__main__":
    run_or_stop(lambda: main(sys.argv[1:]))
