"""Folders and files that appear whole or not at all: written under a hidden temporary name, flushed to disk, then
renamed.

A temporary name has a random part, so no two processes share one, whatever machine or container they are in. Its writer
holds a lock (flock), which the kernel takes back however the process ends: what can be locked was left by a killed one.
Where the file system has no flock nobody can know, and what a killed process left there stays.
"""

import errno
import fcntl
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NO_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)
LOCK = ".lock"
MOST_BYTES = 100
"""Of a target's name in the temporary one: longer names would pass the 255 bytes that file systems allow."""
RANDOM_PART = re.compile(r"[0-9a-f]{16}x")
"""Ends in a letter that is no hexadecimal digit: no process id, which earlier versions had here, looks like it."""


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` to write into; it is renamed to `target` when the block ends and removed when
    it raises.

    FileExistsError when `target` has come to exist; what killed processes of this host left behind is cleared first.
    """
    target = Path(target).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target)
    # a lock file of its own: not every file system locks folders, and one inside would have to leave before the rename
    lock, descriptor = _locked_file(target, LOCK)
    temporary = lock.with_name(lock.name.removesuffix(LOCK))
    try:
        temporary.mkdir()
        yield temporary
        for folder, _, files in os.walk(temporary):
            for name in files:
                sync(Path(folder) / name)
            sync(Path(folder))
        if target.exists():
            raise FileExistsError(f"{target} exists")
        try:
            temporary.rename(target)
        except OSError:
            if target.exists():  # another process was a moment faster
                raise FileExistsError(f"{target} exists") from None
            raise
        sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        lock.unlink(missing_ok=True)
        os.close(descriptor)


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """A temporary file beside `target` to write into; it takes the place of `target` when the block ends and is removed
    when it raises. What killed processes of this host left behind is cleared first."""
    target = Path(target).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target)
    temporary, descriptor = _locked_file(target)
    try:
        yield temporary
        sync(temporary)
        temporary.replace(target)
        sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(descriptor)


def write_file(target: Path, content: bytes) -> None:
    """Write a file whole: a reader sees the old content or the new one. What killed processes of this host left behind
    is cleared first."""
    with new_file(target) as temporary:
        temporary.write_bytes(content)


def write_unless_same(target: Path, content: bytes) -> None:
    """`write_file`, where the file does not have this content: one that does stays, also on a disk that is full. What
    killed processes left behind is cleared in either case."""
    same = False
    with suppress(OSError):
        same = target.read_bytes() == content
    if same:
        with suppress(OSError):
            _remove_abandoned(target.absolute())
    else:
        write_file(target, content)


def _temporary_prefix(target: Path) -> str:
    parts = (target.name, socket.gethostname())
    name, host = (os.fsencode(part)[:MOST_BYTES].decode(errors="ignore") for part in parts)
    return f".{name}.{host}."


def _locked_file(target: Path, ending: str = "") -> tuple[Path, int]:
    """A new file with a temporary name of `target`, open and locked by this process."""
    while True:
        path = target.parent / f"{_temporary_prefix(target)}{secrets.token_hex(8)}x{ending}"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        if _try_lock(descriptor) is not False and _is_at(path, descriptor):
            return path, descriptor
        os.close(descriptor)  # another process took it for abandoned in the moment before it was locked, and removes it


def _remove_abandoned(target: Path) -> None:
    prefix = _temporary_prefix(target)
    for path in target.parent.iterdir():
        if not path.name.startswith(prefix) or path.is_dir():
            continue
        random_part = path.name.removeprefix(prefix).removesuffix(LOCK)
        if RANDOM_PART.fullmatch(random_part):
            with suppress(OSError):  # gone meanwhile, or somebody else's: not ours to clear
                _remove_if_abandoned(path)


def _remove_if_abandoned(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        if _try_lock(descriptor) and _is_at(path, descriptor):
            if path.name.endswith(LOCK):
                shutil.rmtree(path.with_name(path.name.removesuffix(LOCK)), ignore_errors=True)
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool | None:
    """Whether the lock was free and is now held; None where the file system has none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in NO_FLOCK:
            return None
        raise
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def sync(path: Path) -> None:
    """Flush a file's or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
