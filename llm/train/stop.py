"""Requests from outside that a run obeys at the next step boundary: stop (SIGTERM, SIGINT) and save (a touched file).

A signal only sets a flag. Ranks hear of it at different moments, so they add their flags up at the next boundary and
act together: save, then leave with EXIT_STOPPED, which tells a scheduler that the same command goes on.
"""

import os
import signal
import sys
from pathlib import Path
from types import FrameType

EXIT_STOPPED = 75
"""Exit status of a run that saved and stopped on request: sysexits' EX_TEMPFAIL, "try again later"."""
SAVE_FILE = "save"
"""Touching this file in the run folder asks for a checkpoint now; it is removed when that is written."""


SIGNALS = (signal.SIGTERM, signal.SIGINT)


def leave_before_first_step() -> None:
    """Until a `Requests` takes over, a signal ends this process at once: it has made no step that could be saved."""

    def leave(number: int, frame: FrameType | None) -> None:
        if os.environ.get("RANK", "0") == "0":
            name = signal.Signals(number).name
            print(f"stopped by {name} before a step was made; the same command goes on", flush=True)
        sys.stderr.flush()
        os._exit(EXIT_STOPPED)  # an exception would wait for threads, and for collectives that peers have left

    for number in SIGNALS:
        signal.signal(number, leave)


class Requests:
    """The flags of this process; signals are handled from construction to `close`.

    A repeated signal changes nothing: torchrun sends its own SIGTERM after the terminal's SIGINT, while the save goes
    on.
    """

    def __init__(self, run_dir: Path) -> None:
        self.stop: str | None = None
        """Name of the signal that asked to stop."""
        self._save_file = run_dir / SAVE_FILE
        self._previous = {number: signal.signal(number, self._heard) for number in SIGNALS}

    def _heard(self, number: int, frame: FrameType | None) -> None:
        self.stop = self.stop or signal.Signals(number).name

    def save_wanted(self) -> bool:
        """Whether somebody touched the save file."""
        return self._save_file.exists()

    def save_done(self) -> None:
        """Take the save file away, so that the next touch counts."""
        self._save_file.unlink(missing_ok=True)

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
