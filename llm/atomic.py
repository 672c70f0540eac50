"""Folders and files that appear whole or not at all: written under a hidden temporary name, flushed to disk, then
renamed.
"""

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` to write into; it is renamed to `target` when the block ends and removed when
    it raises.

    FileExistsError when `target` has come to exist; what killed processes of this host left behind is cleared first.
    """
    target = Path(target).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target)
    temporary = target.parent / f"{_temporary_prefix(target)}{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
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


def write_file(target: Path, content: bytes) -> None:
    """Write a file whole: a reader sees the old content or the new one. What killed processes of this host left behind
    is cleared first."""
    target = Path(target).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target)
    temporary = target.parent / f"{_temporary_prefix(target)}{os.getpid()}"
    try:
        temporary.write_bytes(content)
        sync(temporary)
        temporary.replace(target)
        sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary_prefix(target: Path) -> str:
    return f".{target.name}.{socket.gethostname()}."


def _remove_abandoned(target: Path) -> None:
    prefix = _temporary_prefix(target)
    for path in target.parent.glob(f"{prefix}*"):
        owner = path.name.removeprefix(prefix)
        if owner.isdecimal() and not _is_alive(int(owner)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _is_alive(process_id: int) -> bool:
    with suppress(PermissionError):  # someone else's, so it lives
        try:
            os.kill(process_id, 0)
        except ProcessLookupError:
            return False
    return True


def sync(path: Path) -> None:
    """Flush a file's or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
