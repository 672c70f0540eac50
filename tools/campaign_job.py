"""Run under torchrun by tools/campaign.py: launch/pretrain.py as it is, with one kill planted from outside.

    campaign_job.py FOLDER --config C --run_dir R ...     the campaign's folder, then the words of launch/pretrain.py

Every attempt waits, before its ranks meet, for its task in FOLDER: a kill, or none. The kill is a real SIGKILL, sent
from inside so that it comes at the very place. Nothing in llm/ knows of it: functions are wrapped here.
"""

import json
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

PRETRAIN = Path(__file__).resolve().parents[1] / "launch" / "pretrain.py"
MARK, FIRST = "LATTICE_CAMPAIGN", "LATTICE_CAMPAIGN_FIRST"
"""Environment of all processes of a campaign: its folder, and the number of the launcher's first attempt."""
QUARTERS = 4
"""Of a file, after which it may be cut."""


@dataclass(frozen=True)
class Kill:
    """A SIGKILL at the `nth` arrival of `rank` at `place`, at `step` or later; at "file" after nth - 1 quarters."""

    place: str
    rank: int
    step: int = 0
    nth: int = 1
    who: str = "rank"
    """What is killed: the rank; the launcher (torchrun) alone; or all: launcher and ranks."""
    restart: str = "torchrun"
    """What brings the run back: torchrun, or the same command."""


class Process(NamedTuple):
    """A living process of the campaign; `attempt` is None for a launcher."""

    pid: int
    attempt: int | None


def attempt_of(environment: dict[str, str]) -> int:
    """Number of the attempt, over all launchers."""
    return int(environment[FIRST]) + int(environment["TORCHELASTIC_RESTART_COUNT"])


def processes(folder: Path) -> list[Process]:
    """All processes of the campaign in `folder`, by what they have in their environment."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            entries = Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
        except OSError:  # ended, or somebody else's
            continue
        environment = dict(entry.partition("=")[::2] for entry in entries)
        if environment.get(MARK) == str(folder):
            found.append(Process(int(pid), attempt_of(environment) if "RANK" in environment else None))
    return found


def task_file(folder: Path, attempt: int) -> Path:
    """The kill of an attempt as JSON; null where it is to run to the end."""
    return folder / f"task_{attempt}.json"


def events_file(folder: Path, attempt: int, rank: int) -> Path:
    """What a rank reports of an attempt, one JSON object a line."""
    return folder / f"events_{attempt}_{rank}.jsonl"


class Killer:
    """Waits at the places for the arrival that the task names."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._attempt = attempt_of(dict(os.environ))
        self._rank = int(os.environ["RANK"])
        self._launcher = os.getppid()
        self._arrivals = 0
        self._kill: Kill | None = None
        self.step = 0
        """That is being trained; 0 outside of one."""

    def await_task(self) -> None:
        """Until the campaign has looked at what the attempt before has left."""
        file = task_file(self._folder, self._attempt)
        while not file.exists():
            time.sleep(0.02)
        task = json.loads(file.read_text())
        self._kill = Kill(**task) if task is not None and task["rank"] == self._rank else None

    def notify(self, event: str, **values: Any) -> None:
        """Write an event; a killed process loses nothing of it."""
        with events_file(self._folder, self._attempt, self._rank).open("a") as file:
            file.write(json.dumps({"event": event, "time": time.time(), **values}) + "\n")

    def waits_at(self, place: str, step: int) -> bool:
        """Whether the kill is still to come, at this place, in this step or before."""
        return self._kill is not None and self._kill.place == place and step >= self._kill.step

    def here(self, place: str, step: int = 0) -> None:
        """This rank is at `place`; nothing happens unless it is the arrival that the task names."""
        if self._kill is not None and self.waits_at(place, step):
            self._arrivals += 1
            if self._arrivals == self._kill.nth:
                self.strike(step)

    def quarters(self) -> int:
        """Of a file, that are written before the kill."""
        assert self._kill is not None
        return self._kill.nth - 1

    def strike(self, step: int) -> None:
        """Kill what the task says."""
        assert self._kill is not None
        kill, self._kill = self._kill, None
        self.notify("strike", step=step, **{"place": kill.place, "rank": kill.rank})
        if kill.who != "rank":
            os.kill(self._launcher, signal.SIGKILL)
        if kill.who == "all":
            for process in processes(self._folder):
                if process.pid != os.getpid():
                    kill_process(process.pid)
        if kill.who != "launcher":
            kill_process(os.getpid())


def kill_process(pid: int) -> None:
    """SIGKILL, if it still lives."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Replace a function by around(function, *its arguments)."""
    original = getattr(owner, name)

    @wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    setattr(owner, name, wrapped)


def plant(killer: Killer) -> None:
    """Have the killer called at every place that lies behind the meeting of the ranks."""
    plant_in_training(killer)
    plant_in_saving(killer)


def plant_in_training(killer: Killer) -> None:
    """Places of start and steps."""
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    from llm import atomic
    from llm.checkpoint import assemble
    from llm.model import LLM
    from llm.parallel.replica import Replica
    from llm.train import folder
    from llm.train.trainer import Trainer

    trained = False

    def build(original: Callable[..., None], *args: Any) -> None:
        killer.here("build")
        original(*args)

    one_at_a_time = threading.Lock()

    def read(original: Callable[..., None], *args: Any) -> None:
        original(*args)
        with one_at_a_time:  # blocks are read on several threads
            killer.here("load")

    def resume(original: Callable[..., list[str]], trainer: Trainer) -> list[str]:
        lines = original(trainer)
        killer.notify("resumed", step=trainer.progress.step)
        killer.here("resumed")
        return lines

    def take_step(original: Callable[..., Any], trainer: Trainer, *args: Any) -> Any:
        nonlocal trained
        if not trained:
            killer.here("first step")
        killer.step = trainer.progress.step + 1
        result = original(trainer, *args)
        killer.step = 0
        if not trained:
            trained = True
            killer.notify("trained", step=trainer.progress.step)
        return result

    def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if killer.step:
            killer.here("forward", killer.step)
        return original(*args, **kwargs)

    def replica(original: Callable[..., None], made: Replica, *args: Any) -> None:
        original(made, *args)
        for parameter in made.model.parameters():
            if parameter.requires_grad:  # what is frozen has no gradient
                parameter.register_hook(lambda _: killer.here("backward", killer.step))

    def sync(original: Callable[..., None], path: Path) -> None:
        original(path)
        if path.name.startswith(".config.yaml."):
            killer.here("run folder")

    def write(original: Callable[..., None], target: Path, content: bytes) -> None:
        # a run that goes on has the same config, and leaves the file as it is: then nothing could be interrupted
        if killer.waits_at("run folder", killer.step):
            atomic.write_file(target, content)
        else:
            original(target, content)

    wrap(atomic, "sync", sync)
    wrap(folder, "write_unless_same", write)
    wrap(Trainer, "__init__", build)
    wrap(assemble, "_do", read)
    wrap(Trainer, "resume", resume)
    wrap(Trainer, "take_step", take_step)
    wrap(LLM, "forward", forward)
    wrap(Replica, "__init__", replica)
    for register in (register_optimizer_step_pre_hook, register_optimizer_step_post_hook):
        register(lambda *_: killer.here("optimizer", killer.step))


class CutFile:
    """A file that is cut off after so many bytes, which reach the disk, by the death of its writer."""

    def __init__(self, file: Any, bytes_left: int, strike: Callable[[], None]) -> None:
        self._file, self._left, self._strike = file, bytes_left, strike

    def __enter__(self) -> "CutFile":
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: Any) -> None:
        """Write; the death comes with the byte after the last one."""
        view = memoryview(data)
        if len(view) > self._left:
            self._file.write(view[: self._left])
            self._file.flush()
            self._strike()
        self._file.write(view)
        self._left -= len(view)


def plant_in_saving(killer: Killer) -> None:
    """Places of a save and its commit."""
    from llm.checkpoint import fragments, store
    from llm.checkpoint.reader import list_steps
    from llm.checkpoint.store import HIDDEN, CheckpointStore

    stage: list[int] = []  # step of the save whose files `advance` is about to find written

    def write_values(original: Callable[..., Any], path: Path, outline: Any, *args: Any) -> Any:
        step = int(path.parent.name.removeprefix(f"{HIDDEN}step_"))
        if killer.waits_at("file", step):
            at = outline.bytes * killer.quarters() // QUARTERS

            def cut(*words: Any, **kwargs: Any) -> CutFile:
                return CutFile(open(*words, **kwargs), at, lambda: killer.strike(step))

            fragments.open = cut  # type: ignore[attr-defined]
        return original(path, outline, *args)

    def advance(original: Callable[..., Any], saving: CheckpointStore) -> Any:
        save = saving._save
        stage[:] = [] if save is None or save.committing else [save.step]
        try:
            return original(saving)
        finally:
            stage.clear()

    def gather_json(original: Callable[..., Any], *args: Any) -> Any:
        values = original(*args)
        if stage:
            killer.here("last file", stage[0])
        return values

    def write_file(original: Callable[..., None], target: Path, content: bytes) -> None:
        original(target, content)
        killer.here("manifest", int(target.parent.name.removeprefix(f"{HIDDEN}step_")))

    def prune(original: Callable[..., None], saving: CheckpointStore, *args: Any) -> None:
        killer.here("commit", list_steps(saving.folder)[0][0])
        original(saving, *args)

    def rmtree(path: Path, **kwargs: Any) -> None:
        if path.name.startswith(f"{HIDDEN}pruned-") and killer.waits_at("pruning", list_steps(path.parent)[0][0]):
            next(path.iterdir()).unlink()
            killer.here("pruning", list_steps(path.parent)[0][0])
        shutil.rmtree(path, **kwargs)

    shutil = store.shutil
    wrap(store, "write_values", write_values)
    wrap(CheckpointStore, "advance", advance)
    wrap(store, "gather_json", gather_json)
    wrap(store, "write_file", write_file)
    wrap(CheckpointStore, "_prune", prune)
    store.shutil = SimpleNamespace(rmtree=rmtree)  # type: ignore[assignment]


def main() -> None:
    """Run launch/pretrain.py with the kill of this attempt planted."""
    from llm.parallel.launch import process

    folder = Path(sys.argv.pop(1))
    sys.argv[0] = str(PRETRAIN)
    killer = Killer(folder)

    def start(original: Callable[..., Any], *args: Any) -> Any:
        killer.await_task()
        killer.here("meeting")
        world = original(*args)
        plant(killer)
        return world

    wrap(process, "start", start)
    runpy.run_path(str(PRETRAIN), run_name="__main__")


def task_text(kill: Kill | None) -> str:
    """What `Killer.await_task` reads."""
    return json.dumps(None if kill is None else asdict(kill))


if __name__ == "__main__":
    main()
