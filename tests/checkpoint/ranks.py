"""Ranks as threads of one process: the checkpoint store of several, without a process group."""

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch

from llm.checkpoint import store
from llm.errors import UserError
from llm.parallel.collectives import agreed_error
from llm.parallel.launch.world import World

T = TypeVar("T")
PATIENCE_S = 60.0


def as_ranks(monkeypatch: pytest.MonkeyPatch, size: int, action: Callable[[World], T]) -> list[T]:
    """What `action` returns on each rank; the error of the lowest rank that has one is raised.

    A rank that calls one collective more or less than the others breaks the barrier for all.
    """
    slots: list[Any] = [None] * size
    meeting = threading.Barrier(size, timeout=PATIENCE_S)

    def gather(value: Any, world: World) -> list[Any]:
        slots[world.rank] = value
        meeting.wait()
        found = list(slots)
        meeting.wait()
        return found

    def decide(choose: Callable[[], Any], world: World) -> Any:
        outcome: tuple[Any, str | None] = (None, None)
        if world.is_main:
            try:
                outcome = (choose(), None)
            except (UserError, OSError) as error:
                outcome = (None, str(error))
        value, message = gather(outcome, world)[0]
        if message is not None:
            raise agreed_error(message)
        return value

    monkeypatch.setattr(store, "gather_json", gather)
    monkeypatch.setattr(store, "main_decides", decide)
    results: list[Any] = [None] * size
    errors: list[Exception | None] = [None] * size

    def rank(number: int) -> None:
        try:
            results[number] = action(World(number, size, number, torch.device("cpu")))
        except Exception as error:
            errors[number] = error
            if not getattr(error, "agreed", False):
                meeting.abort()

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        if error is not None and not isinstance(error, threading.BrokenBarrierError):
            raise error
    assert not any(errors), errors
    return results
