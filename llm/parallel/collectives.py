"""Small agreements between ranks: integers, sums, rows of numbers, JSON. Nothing here pickles."""

import itertools
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from llm.errors import DamagedFile, UserError
from llm.parallel.launch.liveness import heard, wait_for
from llm.parallel.launch.world import World

T = TypeVar("T")
_decisions = itertools.count()  # every rank asks the same questions in the same order


def sum_over_ranks(values: Sequence[float], world: World) -> list[float]:
    """Element-wise float64 sum over all ranks; counts up to 2^53 stay exact."""
    total = torch.tensor(values, dtype=torch.float64, device=world.device)
    if world.size > 1:
        dist.all_reduce(total)
    return total.tolist()


def gather_json(value: Any, world: World) -> list[Any]:
    """Every rank's JSON value, in the order of ranks, on every rank."""
    if world.size == 1:
        return [value]
    mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(world.device)
    lengths = [torch.zeros(1, dtype=torch.int64, device=world.device) for _ in range(world.size)]
    dist.all_gather(lengths, torch.tensor([mine.numel()], dtype=torch.int64, device=world.device))
    longest = max(int(length) for length in lengths)
    padded = torch.zeros(longest, dtype=torch.uint8, device=world.device)
    padded[: mine.numel()] = mine
    rows = [torch.empty_like(padded) for _ in range(world.size)]
    dist.all_gather(rows, padded)
    return [
        json.loads(bytes(row[: int(length)].cpu().numpy()).decode()) for row, length in zip(rows, lengths, strict=True)
    ]


def gather_rows(rows: Sequence[NDArray[np.float64]], world: World) -> NDArray[np.float64]:
    """The rows of all ranks, which all have the same width, in the order of ranks, on every rank; (0, 0) where no rank
    has any.
    """
    mine = np.concatenate(rows) if rows else np.zeros((0, 0))
    if world.size == 1:
        return mine
    shapes = torch.zeros(world.size, 2, dtype=torch.int64, device=world.device)
    dist.all_gather_into_tensor(shapes, torch.tensor([mine.shape], dtype=torch.int64, device=world.device))
    most, width = shapes.amax(0).tolist()
    padded = torch.zeros(most * width, dtype=torch.float64)
    padded[: mine.size] = torch.from_numpy(mine).reshape(-1)
    every = torch.empty(world.size * most * width, dtype=torch.float64, device=world.device)
    dist.all_gather_into_tensor(every, padded.to(world.device))
    of_ranks = every.cpu().numpy().reshape(world.size, most, width)
    return np.concatenate([of_rank[:n] for of_rank, n in zip(of_ranks, shapes[:, 0].tolist(), strict=True)])


def main_decides(choose: Callable[[], Any], world: World) -> Any:
    """Rank 0 calls `choose`; its JSON result, or its UserError or OSError, is the same on every rank.

    The others wait at the key-value store, not in a collective: rank 0 may take hours (sharding raw text), far beyond
    the time-out of the process group. They give up when they have heard nothing of it for that long.
    """
    # what a rank decides alone, as the checks before the ranks meet, is none of the questions that it has in common
    key = f"main_decides/{next(_decisions)}" if world.size > 1 else ""
    if world.is_main:
        with nullcontext() if world.store is None else heard(world.store, key, world.timeout_s):
            try:
                outcome = [choose(), None]
            except (UserError, OSError) as error:
                outcome = [None, str(error)]
        if world.size > 1:
            assert world.store is not None
            world.store.set(key, json.dumps(outcome))
    else:
        assert world.store is not None
        outcome = json.loads(wait_for(world.store, key, world.timeout_s, "rank 0"))
    value, message = outcome
    if message is not None:
        raise agreed_error(message)
    return value


def all_or_none(action: Callable[[], T], world: World) -> T:
    """Every rank calls `action`; when any rank meets a UserError or OSError, all ranks raise the same error.

    It is a DamagedFile when the first failing rank found one.
    """
    result: T | None = None
    failure = None
    try:
        result = action()
    except (UserError, OSError) as error:
        text = str(error) if world.size == 1 else f"{error} (rank {world.rank})"
        failure = [text, isinstance(error, DamagedFile)]
    failures = [item for item in gather_json(failure, world) if item is not None]
    if failures:
        message, damaged = failures[0]
        raise agreed_error(message, DamagedFile if damaged else UserError)
    return result  # type: ignore[return-value]


def agreed_error(message: str, kind: type[UserError] = UserError) -> UserError:
    """A UserError that every rank raises together, so that only rank 0 prints it."""
    error = kind(message)
    error.agreed = True
    return error
