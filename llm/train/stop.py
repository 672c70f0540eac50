"""Requests from outside that a run obeys at the next step boundary: stop (SIGTERM, SIGINT) and save (a touched file).

A signal only sets a flag. Ranks hear of it at different moments, so they add their flags up at the next boundary and
act together: save, then leave with EXIT_STOPPED, which tells a scheduler that the same command goes on.
"""

import signal
from pathlib import Path
from types import FrameType

EXIT_STOPPED = 75
"""Exit status of a run that saved and stopped on request: sysexits' EX_TEMPFAIL, "try again later"."""
SAVE_FILE = "save"
"""Touching this file in the run folder asks for a checkpoint now; it is removed when that is written."""


class Requests:
    """The flags of this process; signals are handled from construction to `close`.

    A repeated signal changes nothing: torchrun sends its own SIGTERM after the terminal's SIGINT, while the save goes
    on.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, run_dir: Path) -> None:
        self.stop: str | None = None
        """Name of the signal that asked to stop."""
        self._save_file = run_dir / SAVE_FILE
        self._previous = {number: signal.signal(number, self._heard) for number in self.SIGNALS}

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
