"""Ranks meet, and find out who is missing, through the store alone. Here they are threads, each with its own client."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from llm.parallel.launch import liveness
from llm.parallel.launch.liveness import PeerError, Roll, heard, wait_for


@pytest.fixture
def client() -> Callable[[], dist.TCPStore]:
    """A new client of one store that outlives its clients, as torchrun's does."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return lambda: dist.TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)


def together(*actions: Callable[[], Any]) -> list[Any]:
    """What each action, called in its own thread, returned or raised."""
    results: list[Any] = [None] * len(actions)

    def call(i: int) -> None:
        try:
            results[i] = actions[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def after(seconds: float, action: Callable[[], Any]) -> Callable[[], Any]:
    def call() -> Any:
        time.sleep(seconds)
        return action()

    return call


def meet(client: Callable[[], dist.TCPStore], size: int = 3) -> tuple[list[Roll], list[dist.Store]]:
    rolls = [Roll(client(), rank, size) for rank in range(size)]
    return rolls, together(*(lambda roll=roll: roll.meet(20) for roll in rolls))


def test_a_missing_rank_is_named(client: Callable[[], dist.TCPStore]) -> None:
    rolls = [Roll(client(), rank, 3) for rank in range(3)]
    for error in together(lambda: rolls[0].meet(1.5), lambda: rolls[2].meet(1.5)):
        assert isinstance(error, PeerError) and "rank 1 did not come within 1.5 s" in str(error)


def test_rank_0_is_named_where_only_its_predecessor_has_been(client: Callable[[], dist.TCPStore]) -> None:
    meet(client)
    with pytest.raises(PeerError, match="rank 0 did not come"):
        Roll(client(), 1, 3).meet(0.3)


@pytest.mark.parametrize("late", [0, 1])
def test_a_restarted_job_reads_nothing_of_its_predecessor(client: Callable[[], dist.TCPStore], late: int) -> None:
    """Whichever rank comes late: all others are there first, with only what the dead attempt left in the store."""
    _, before = meet(client)
    for store in before:
        store.set("address", "of the dead")
    rolls = [Roll(client(), rank, 3) for rank in range(3)]
    meetings = [lambda roll=roll: roll.meet(20) for roll in rolls]
    meetings[late] = after(0.3, meetings[late])
    stores = together(*meetings)
    assert not any(store.check(["address"]) for store in stores)
    stores[0].set("address", "new")
    assert [store.get("address") for store in stores] == [b"new"] * 3


def test_the_rank_that_failed_first_is_the_reason(
    client: Callable[[], dist.TCPStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liveness, "GRACE_S", 1.0)  # a thread may begin late on a busy machine
    rolls, _ = meet(client)
    found = together(rolls[0].why_alone, after(0.1, lambda: rolls[2].failed("ValueError: boom")))
    assert found[0] == ("rank 2 failed: ValueError: boom", True)


def test_ranks_that_do_not_wait_are_named_where_no_reason_is_known(
    client: Callable[[], dist.TCPStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liveness, "GRACE_S", 1.0)  # a thread may begin late on a busy machine
    rolls, _ = meet(client)
    for reason in together(rolls[0].why_alone, rolls[1].why_alone):
        assert reason == ("rank 2 did not meet this failure", False)


def test_a_rank_at_work_is_waited_for_as_long_as_it_is_heard(client: Callable[[], dist.TCPStore]) -> None:
    patience = 0.8

    def work() -> None:
        store = client()
        with heard(store, "decision", patience):
            time.sleep(2 * patience)
        store.set("decision", "yes")

    assert together(work, lambda: wait_for(client(), "decision", patience, "rank 0"))[1] == b"yes"
    with pytest.raises(PeerError, match="rank 0 was not heard for 0.2 s"):
        wait_for(client(), "another", 0.2, "rank 0")
