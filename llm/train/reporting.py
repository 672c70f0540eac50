"""Places that a run reports to, each of which may fail without ending it: a disk may be full, a pipe closed, a folder
gone. What a place could not take is counted; one line says when that begins, and one when it is over.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Generic, TypeVar

Thing = TypeVar("Thing")
LONGEST_PAUSE = 256
"""Most uses between two attempts to open something that failed."""


class Channel:
    """One place that is reported to."""

    def __init__(self, name: str, unit: str) -> None:
        """name, unit: for messages; `unit` is the plural of what is lost."""
        self._name, self._unit = name, unit
        self._lost = 0
        self._reason = ""

    def send(self, action: Callable[[], object], count: int = 1) -> str | None:
        """Do what reports `count` units; a line where that failed for the first time, or works again."""
        try:
            action()
        except Exception as error:  # whatever a library thinks of
            began = not self._lost
            self._lost += count
            self._reason = reason_of(error)
            return f"{self._name} cannot be written ({self._reason}); the run goes on without" if began else None
        if not self._lost:
            return None
        lost, self._lost = self._lost, 0
        return f"{self._name} is written again; {lost} {self._unit} were lost"

    def end(self, action: Callable[[], object]) -> str | None:
        """Do what closes the place; a line where something was lost in the end."""
        try:
            action()
        except Exception as error:
            self._lost, self._reason = max(self._lost, 1), reason_of(error)
        return f"{self._name}: the last {self._lost} {self._unit} were lost ({self._reason})" if self._lost else None


def reason_of(error: BaseException) -> str:
    """An error in a few words."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


class LineFile:
    """A file in UTF-8 that blocks of lines are appended to, each whole or not at all.

    It is opened when there is something to write, and anew after a failure, or when it, perhaps with its folder, was
    removed. A block that follows half a line, which a killed process left, begins on a line of its own.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None
        self._torn = False

    def write(self, text: str) -> None:
        """Append the lines of `text`, and a newline. OSError where that cannot be done; then none of it is there."""
        descriptor = self._open()
        start, written = os.fstat(descriptor).st_size, 0
        block = b"\n" * self._torn + text.encode("utf-8", "backslashreplace") + b"\n"
        try:
            while written < len(block):
                written += os.write(descriptor, block[written:])
        except OSError:
            if written:
                try:
                    os.ftruncate(descriptor, start)
                except OSError:
                    self._torn = True
            with suppress(OSError):
                self.close()
            raise
        self._torn = False

    def _open(self) -> int:
        if self._descriptor is not None and not os.fstat(self._descriptor).st_nlink:
            self.close()
        if self._descriptor is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            size = os.fstat(self._descriptor).st_size
            self._torn = bool(size) and os.pread(self._descriptor, 1, size - 1) != b"\n"
        return self._descriptor

    def close(self) -> None:
        """Close the file. OSError where the system says only now that something was not written."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)


class Opened(Generic[Thing]):
    """Something that is opened when it is first used, and anew after it failed: after ever more uses in vain, as each
    attempt may take a while and leave something behind.
    """

    def __init__(self, open_it: Callable[[], Thing], close_it: Callable[[Thing], object]) -> None:
        self._open_it, self._close_it = open_it, close_it
        self._thing: Thing | None = None
        self._failure: Exception | None = None
        self._pause = 0
        self._next_pause = 1

    def use(self, action: Callable[[Thing], object]) -> None:
        """Call `action` with it. Raises what opening or `action` raised, also while it pauses."""
        if self._thing is None and self._failure is not None and self._pause:
            self._pause -= 1
            raise self._failure
        try:
            if self._thing is None:
                self._thing = self._open_it()
            action(self._thing)
        except Exception as error:
            self._failure, self._pause = error, self._next_pause
            self._next_pause = min(2 * self._next_pause, LONGEST_PAUSE)
            with suppress(Exception):
                self.close()
            raise
        self._failure, self._next_pause = None, 1

    def close(self) -> None:
        """Close it; it may be used again."""
        thing, self._thing = self._thing, None
        if thing is not None:
            self._close_it(thing)
