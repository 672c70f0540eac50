"""Signals that ask a run to stop: by hand, by a closing terminal, by a scheduler before it kills.

A run that gets one saves and ends with EXIT_STOPPED, by which a scheduler knows that the same command goes on.
"""

import signal

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
