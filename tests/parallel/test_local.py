"""A job of this machine alone: what torchrun is given, and who is asked to stop."""

import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from llm.parallel.launch import local
from llm.signals import STOP_SIGNALS


@pytest.fixture(autouse=True)
def signals_of_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_one_machine_needs_no_name_service_and_no_other_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.run import parse_args

    for key, value in {"PET_NNODES": "4", "PET_NPROC_PER_NODE": "8", "PET_MAX_RESTARTS": "9"}.items():
        monkeypatch.setenv(key, value)  # as a cluster's operator sets them for torchrun
    reported = parse_args([*local.flags(2, max_restarts=1), "script.py"])
    assert (reported.local_addr, reported.standalone, reported.nnodes) == ("127.0.0.1", True, "1")
    assert (reported.nproc_per_node, reported.max_restarts) == ("2", 1)
    assert local.command(2)[:3] == [sys.executable, "-m", "torch.distributed.run"]


def test_a_request_to_stop_reaches_a_rank_that_is_made_later_however_often_it_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ranks: list[int] = []
    monkeypatch.setattr(local, "_children", lambda: ranks)  # of all children of this process, which has others too
    monkeypatch.setattr(local, "AGAIN_S", 0.01)
    request = local._StopRequest()
    signal.raise_signal(signal.SIGUSR1)
    signal.raise_signal(signal.SIGTERM)  # would end this process
    assert request.signal == signal.SIGUSR1
    late = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    ranks.append(late.pid)
    assert late.wait(timeout=300) == -signal.SIGTERM
    request.end()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_ranks_are_the_children_of_this_process() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert child.pid in (local._children() or [])
    child.communicate(b"\n", timeout=300)
    assert child.pid not in (local._children() or [])


def test_where_children_are_not_listed_torchrun_passes_the_signal_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.elastic.multiprocessing.api import SignalException

    monkeypatch.setattr(local, "_children", lambda: None)
    request = local._StopRequest()
    with pytest.raises(SignalException):
        signal.raise_signal(signal.SIGTERM)
    request.end()
