"""Requests from outside that a run obeys at the next step boundary: stop (llm/signals.py) and save (a touched file).

A signal only sets a flag. Ranks hear of it at different moments, so they add their flags up at the next boundary and
act together: save, then leave with EXIT_STOPPED.
"""

import signal
from contextlib import suppress
from pathlib import Path
from types import FrameType

from llm.environment import in_torchrun
from llm.signals import Leaving, heeded, leave_when_asked

SAVE_FILE = "save"
"""Touching this file in the run folder asks for a checkpoint now; it is removed when that is written."""


def leave_before_first_step() -> None:
    """Until a `Requests` takes over, a signal ends this process at once: it has made no step that could be saved."""
    leave_when_asked(" before a step was made; the same command goes on")


def _over(number: int, frame: FrameType | None) -> None:
    """The run has ended: nothing is left to stop."""


class Requests:
    """The flags of this process; signals are handled from construction to `close`.

    A repeated signal changes nothing: torchrun sends its own SIGTERM after the terminal's SIGINT, while the save goes
    on.
    """

    def __init__(self, run_dir: Path) -> None:
        self.stop: str | None = None
        """Name of the signal that asked to stop."""
        self._save_file = run_dir / SAVE_FILE
        self._obeyed: int | None = None  # the time of a touch whose file cannot be removed
        self._previous = {number: signal.signal(number, self._heard) for number in heeded(in_torchrun())}

    def _heard(self, number: int, frame: FrameType | None) -> None:
        self.stop = self.stop or signal.Signals(number).name

    def save_wanted(self) -> bool:
        """Whether somebody touched the save file; False also where the run folder cannot be looked into."""
        touched = self._touched()
        return touched is not None and touched != self._obeyed

    def save_done(self) -> None:
        """Take the save file away, so that the next touch counts."""
        self._obeyed = self._touched()
        with suppress(OSError):
            self._save_file.unlink(missing_ok=True)

    def _touched(self) -> int | None:
        try:
            return self._save_file.stat().st_mtime_ns
        except OSError:
            return None

    def close(self) -> None:
        """Give the signals back; those that would have ended a run before its first step do nothing any more."""
        for number, handler in self._previous.items():
            signal.signal(number, _over if isinstance(handler, Leaving) else handler)
