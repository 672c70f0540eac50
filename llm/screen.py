"""The screen (standard output and standard error) of a process whose work must not end with it.

A pipe is closed (`| head`), a terminal is gone, the disk behind `> out.txt` is full, an encoding lacks a letter: print
raises, and so do progress bars and libraries. `protect` makes all of them go on. What is lost is counted, and
`complaint` says so once to whoever has another place to write it.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


class Watched:
    """A text stream that remembers what went wrong with it; all else is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._error: OSError | None = None
        escape_unknown(stream)

    def write(self, text: str) -> int:
        """Write; len(text) also where it was lost."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush what can be flushed."""
        self._try(self._stream.flush)

    def complaint(self) -> OSError | None:
        """What went wrong since the last call."""
        error, self._error = self._error, None
        return error

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            self._error = error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Protected(Watched):
    """One that never raises for what became of its other end."""

    def _try(self, action: Callable[[], object]) -> None:
        try:
            super()._try(action)
        except OSError:
            pass
        except ValueError as error:  # closed
            self._error = OSError(str(error))


def protect() -> None:
    """From now on nothing that this process prints can end it. Twice is once."""
    for number in range(3):  # else the next file opened would get the number, and whatever native code prints
        try:
            os.fstat(number)
        except OSError:
            with suppress(OSError):
                os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started this process
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (as long as the process)
        if not isinstance(stream, Protected):
            setattr(sys, name, Protected(stream))


@contextmanager
def watched() -> Iterator[list[Watched]]:
    """Inside, the screen is watched; the streams that there are."""
    before = sys.stdout, sys.stderr
    streams = [Watched(stream) for stream in before if stream is not None]
    for name, stream in zip(("stdout", "stderr"), before, strict=True):
        setattr(sys, name, next((w for w in streams if w._stream is stream), None))
    try:
        yield streams
    finally:
        sys.stdout, sys.stderr = before


def escape_unknown(stream: TextIO | None) -> None:
    """Have the stream write what its encoding lacks as \\u escapes, where it can."""
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        with suppress(ValueError, OSError):
            reconfigure(errors="backslashreplace")


def complaint() -> OSError | None:
    """What went wrong on the screen since the last call; None also where it is not protected."""
    found = [stream.complaint() for stream in (sys.stdout, sys.stderr) if isinstance(stream, Protected)]
    return next((error for error in found if error is not None), None)
