"""Signals that ask a run to stop: by hand, by a closing terminal, by a scheduler before it kills.

A run that gets one saves and ends with EXIT_STOPPED, by which a scheduler knows that the same command goes on.
"""

import os
import signal
import sys
from contextlib import suppress
from types import FrameType

from llm.environment import in_torchrun, rank_or_zero

EXIT_STOPPED = 75
"""Exit status of a run that saved and stopped on request: sysexits' EX_TEMPFAIL, "try again later"."""

STOP_SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGHUP,  # of a terminal that closes
    signal.SIGUSR1,  # before the time is up: Slurm's --signal=USR1, Grid Engine's -notify
    signal.SIGUSR2,
    signal.SIGXCPU,  # before the CPU time is up
)


def heeded(launched: bool) -> list[signal.Signals]:
    """Those that this process is to obey. A SIGHUP that was ignored from the start (nohup) stays so, unless a launcher
    sends it (`launched`): it kills whom it sent one and who does not end.
    """
    deaf = not launched and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in STOP_SIGNALS if not (deaf and number == signal.SIGHUP)]


class Leaving:
    """A handler that ends this process at once, with EXIT_STOPPED and a line from rank 0."""

    def __init__(self, said: str) -> None:
        """said: what stands in that line after the name of the signal."""
        self._said = said

    def __call__(self, number: int, frame: FrameType | None) -> None:
        with suppress(OSError, ValueError, RuntimeError):  # the screen may be gone, or in the middle of a line
            if rank_or_zero() == 0:
                print(f"stopped by {signal.Signals(number).name}{self._said}", flush=True)
            sys.stderr.flush()
        os._exit(EXIT_STOPPED)  # an exception would wait for threads, and for collectives that peers have left


def leave_when_asked(said: str) -> None:
    """From now on a signal ends this process at once: nothing is lost that is not asked for again. said: as of Leaving.
    """
    for number in heeded(in_torchrun()):
        signal.signal(number, Leaving(said))
