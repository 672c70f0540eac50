"""A job of several processes of one machine, started through torchrun.

One machine needs no name service: the processes meet at 127.0.0.1, also where the machine's own name leads nowhere.
What a cluster left in the environment for torchrun (PET_NNODES and the like) is overruled.
"""

import logging
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

from llm.signals import EXIT_STOPPED, heeded

LOOPBACK = "127.0.0.1"
AGAIN_S = 1.0
"""Seconds between two times that the ranks are asked to stop: a rank that has only just been made cannot hear yet."""
PATIENCE_S = 30.0
"""How long after a first signal another one changes nothing: the ranks are saving."""


def flags(nproc: int, max_restarts: int = 0) -> list[str]:
    """torchrun's flags for `nproc` processes of this machine."""
    return [
        "--standalone",
        "--nnodes=1",
        f"--nproc_per_node={nproc}",
        f"--local_addr={LOOPBACK}",
        f"--max-restarts={max_restarts}",
    ]


def command(nproc: int, max_restarts: int = 0) -> list[str]:
    """The words of a shell command before a script and its arguments: torchrun of this Python."""
    return [sys.executable, "-m", "torch.distributed.run", *flags(nproc, max_restarts)]


def torchrun(script: str, arguments: list[str], nproc: int, threads: int) -> int:
    """Start `script` on `nproc` processes of this machine through torchrun, in this process; return its exit status.

    For one machine this saves typing torchrun's own flags, a failed worker's line stays the last one (torchrun would
    add a traceback of its own), and a run that saved and stopped on request says so by its status.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun_main

    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ["PET_SIGNALS_TO_HANDLE"] = ""  # torchrun itself would end its ranks 30 s after a signal, saved or not
    logging.disable(logging.ERROR)  # torchrun's report of what the worker has already said
    request = _StopRequest()
    try:
        torchrun_main([*flags(nproc), script, *arguments])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode == EXIT_STOPPED:
            return EXIT_STOPPED
        if request.signal and failure.exitcode == -signal.SIGTERM:
            print(f"stopped by {request.signal.name} before a step was made; the same command goes on", flush=True)
            return EXIT_STOPPED
        if failure.exitcode > 0:
            said = isinstance(failure.error_file_data.get("message"), dict)  # the line that a rank leaves there
            if not said:
                print(f"error: rank {rank} left with status {failure.exitcode}", file=sys.stderr)
            return failure.exitcode
        print(f"error: rank {rank} was killed by {failure.signal_name()}; the same command resumes", file=sys.stderr)
        return 128 - failure.exitcode
    except SignalException as given_up:
        print(f"stopped by {given_up.sigval.name}; the same command resumes from the last checkpoint", file=sys.stderr)
        return 128 + given_up.sigval
    finally:
        request.end()
    return 0


class _StopRequest:
    """Passes what asks this process to stop on to the ranks, which save and end; torchrun then ends by itself.

    As SIGTERM, which is quiet also in a rank that is only importing. A terminal's signals do not reach the ranks: they
    have sessions of their own.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        """The first one."""
        self._since = 0.0
        self._over = threading.Event()
        for number in heeded(launched=False):
            signal.signal(number, self._heard)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._since = signal.Signals(number), time.monotonic()
            if _children() is not None:
                threading.Thread(target=self._ask, daemon=True).start()
                return
        elif time.monotonic() - self._since < PATIENCE_S:
            return
        from torch.distributed.elastic.multiprocessing.api import SignalException

        # torchrun passes it on, waits 30 s and kills
        raise SignalException(f"got {signal.Signals(number).name}", sigval=signal.Signals(number))

    def _ask(self) -> None:
        while not self._over.is_set():
            for child in _children() or []:
                with suppress(OSError):
                    os.kill(child, signal.SIGTERM)
            self._over.wait(AGAIN_S)

    def end(self) -> None:
        """The ranks are gone: from now on nobody is asked."""
        self._over.set()


def _children() -> list[int] | None:
    """Processes that this one's main thread started; None where the system does not say."""
    pid = os.getpid()
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return None
