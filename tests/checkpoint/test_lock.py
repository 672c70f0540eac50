"""One job at a time in a run folder: who comes second learns who is first, and the dead hold nothing."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from llm.checkpoint import lock
from llm.checkpoint.lock import LOCK_FILE, refuse_if_held, run_lock
from llm.errors import UserError
from llm.parallel.launch.world import World
from tests.distributed.harness import environment

WORLD = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
HOLDER = """
import errno, fcntl, sys
from pathlib import Path
import torch
from llm.checkpoint.lock import run_lock
from llm.parallel.launch.world import World
if sys.argv[2] == "without flock":
    def flock(descriptor, mode):
        raise OSError(errno.ENOLCK, "No locks available")
    fcntl.flock = flock
with run_lock(Path(sys.argv[1]), World(0, 1, 0, torch.device("cpu"))):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(params=["with flock", "without flock"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    def flock(descriptor: int, mode: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    if request.param == "without flock":
        monkeypatch.setattr(fcntl, "flock", flock)
    return str(request.param)


@contextmanager
def another_job(run_dir: Path, kind: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run_dir), kind],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**environment(), **variables},
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def take(run_dir: Path) -> None:
    with run_lock(run_dir, WORLD):
        assert (run_dir / LOCK_FILE).exists()


def test_a_second_job_is_refused_and_told_who_is_first(tmp_path: Path, kind: str) -> None:
    with another_job(tmp_path, kind) as process:
        for attempt in (take, refuse_if_held):
            expected = f"{tmp_path}: in use by process {process.pid} on {os.uname().nodename}, since 2"
            with pytest.raises(UserError, match=expected):
                attempt(tmp_path)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, None])
def test_a_job_that_has_ended_holds_nothing_however_it_ended(
    tmp_path: Path, kind: str, end: signal.Signals | None
) -> None:
    with another_job(tmp_path, kind) as process:
        if end is None:
            process.communicate()
        else:
            process.send_signal(end)
            process.wait()
        assert (tmp_path / LOCK_FILE).exists() == (end is not None)
        refuse_if_held(tmp_path)
        take(tmp_path)
    assert not (tmp_path / LOCK_FILE).exists()


def test_two_of_one_process_exclude_each_other_too(tmp_path: Path) -> None:
    with run_lock(tmp_path, WORLD), pytest.raises(UserError, match=f"process {os.getpid()}"):
        take(tmp_path)
    take(tmp_path)


def test_without_flock_a_job_of_another_machine_is_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, mode: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    record = {"host": "node7", "pid": 12, "began": "1", "machine": "node7 boot pid:[1]", "since": "today", "job": None}
    (tmp_path / LOCK_FILE).write_text(json.dumps(record))
    take(tmp_path)  # where there is flock, nobody holds it
    (tmp_path / LOCK_FILE).write_text(json.dumps(record))
    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match=f"process 12 on node7, since today.*remove {tmp_path / LOCK_FILE}"):
        take(tmp_path)


def test_a_restarted_attempt_waits_for_the_last_one_to_die(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a-job")
    with another_job(tmp_path, kind, TORCHELASTIC_RUN_ID="a-job") as process:
        refuse_if_held(tmp_path)
        monkeypatch.setattr(lock.time, "sleep", lambda seconds: (process.kill(), process.wait()))
        take(tmp_path)


def test_the_lock_of_a_name_that_its_holder_removes_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening the file and locking it, the holder may remove it: what is locked then has no name."""
    (tmp_path / LOCK_FILE).touch()
    flock, opened = fcntl.flock, []

    def removed_before(descriptor: int, mode: int) -> None:
        if not opened:
            (tmp_path / LOCK_FILE).unlink()
        opened.append(descriptor)
        flock(descriptor, mode)

    monkeypatch.setattr(fcntl, "flock", removed_before)
    with run_lock(tmp_path, WORLD):
        assert len(opened) == 2
        with pytest.raises(UserError, match="in use"):
            take(tmp_path)


def test_a_folder_that_a_failed_start_made_is_removed_again(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bad"), run_lock(tmp_path / "run", WORLD):
        raise ValueError("bad")
    assert not (tmp_path / "run").exists()
    with run_lock(tmp_path / "run", WORLD):
        (tmp_path / "run" / "kept").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["kept"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=str(tmp_path / "file")):
        take(tmp_path / "file" / "run")
