"""One job at a time in a run folder.

Rank 0 holds an advisory lock (flock) on a file in the folder for as long as the job lives; the kernel takes it back
when the process ends, however it ends, so what a killed job left is recognised at once. The file says who holds it.

On a file system without flock that record alone counts: its job is over when the process is seen to be gone, which only
the same machine can see; a record of another machine is believed until somebody removes the file. Where flock is local
to each machine (a mount option of Lustre), jobs of two machines do not see each other.
"""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llm.errors import UserError
from llm.parallel.collectives import main_decides
from llm.parallel.launch.liveness import own_place, state_of
from llm.parallel.launch.world import World

LOCK_FILE = "lock"
SAME_JOB_S = 35.0
"""How long an attempt waits for the one before it in the same torchrun job, on another machine perhaps: torchrun kills
a rank 30 s after its SIGTERM."""
NOT_SUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)


@contextmanager
def run_lock(run_dir: Path, world: World) -> Iterator[None]:
    """Inside, the folder belongs to this job; it is made if need be (collective).

    UserError on all ranks, naming machine and process, when another job holds it.
    """
    held: list[_Held] = []
    main_decides(lambda: held.append(_take(run_dir)), world)
    try:
        yield
    finally:
        for lock in held:
            lock.release()


def refuse_if_held(run_dir: Path) -> None:
    """UserError when another job is at work in the folder; for the start of a job, which takes the lock only later."""
    file = run_dir / LOCK_FILE
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError:
        return  # no job has been here, or the folder cannot be used, which the run says better
    try:
        record = _read(descriptor)
        free = _try_flock(descriptor, fcntl.LOCK_SH)
        if free is None:
            free = _is_over(record)
        if not free and record and not _of_this_job(record):
            raise _in_use(run_dir, record)
    finally:
        os.close(descriptor)


class _Held:
    """The lock file, open and locked."""

    def __init__(self, file: Path, descriptor: int, made_folder: bool) -> None:
        self._file, self._descriptor, self._made_folder = file, descriptor, made_folder

    def release(self) -> None:
        """Remove the file, and the folder if the job made it and left nothing there; then give up the lock."""
        with suppress(OSError):
            self._file.unlink()
            if self._made_folder:
                self._file.parent.rmdir()
        os.close(self._descriptor)


def _take(run_dir: Path) -> _Held:
    file = run_dir / LOCK_FILE
    made_folder = not run_dir.exists()
    began = time.monotonic()
    while True:
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            record = _read(descriptor)
            free = _try_flock(descriptor, fcntl.LOCK_EX)
            if free is None:
                free = not record or _is_over(record)
            if free and _is_at(file, descriptor):
                _write(descriptor)
                return _Held(file, descriptor, made_folder)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        # without a record somebody has only just come, or only looks
        patience = SAME_JOB_S if _of_this_job(record) else 0.0 if record else 1.0
        if not free and time.monotonic() - began > patience:
            raise _in_use(run_dir, record)
        time.sleep(0.05)


def _try_flock(descriptor: int, mode: int) -> bool | None:
    """Whether the lock was free and is now taken; None where the file system has none."""
    try:
        fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in NOT_SUPPORTED:
            return None
        raise
    return True


def _is_at(file: Path, descriptor: int) -> bool:
    """Whether the open file is still the one of that name: its last holder may just have removed it."""
    try:
        return os.path.samestat(os.stat(file), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _read(descriptor: int) -> dict[str, Any]:
    """Who holds the lock, or held it last; empty where the file does not say."""
    try:
        record = json.loads(os.pread(descriptor, 1 << 16, 0))
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _write(descriptor: int) -> None:
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    record = {"host": socket.gethostname(), "since": since, "job": _job(), **own_place()}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(record).encode() + b"\n", 0)
    os.fsync(descriptor)


def _job() -> str | None:
    """What torchrun calls this job, where that is a name of its own."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if name in (None, "", "none") else name


def _of_this_job(record: dict[str, Any]) -> bool:
    return record.get("job") is not None and record["job"] == _job()


def _is_over(record: dict[str, Any]) -> bool:
    return "pid" in record and state_of(record) == "gone"


def _in_use(run_dir: Path, record: dict[str, Any]) -> UserError:
    known = f"process {record.get('pid')} on {record.get('host')}, since {record.get('since')}"
    who = known if record else "another job"
    return UserError(
        f"{run_dir}: in use by {who}; stop that job, or use another --run_dir "
        f"(if its machine is down, remove {run_dir / LOCK_FILE})"
    )
