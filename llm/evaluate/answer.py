"""From requests to answers on all ranks: each request that differs is asked once, and only if no earlier start of the
same evaluation has its answer in the journal.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from tqdm import tqdm

from llm.errors import UserError
from llm.evaluate.journal import Journal
from llm.evaluate.requests import Answer, Request, digest
from llm.parallel.collectives import gather_json, main_decides
from llm.parallel.grid import Grid


class Answering(Protocol):
    """What answers requests on the ranks of a replica."""

    def answers(self, requests: Sequence[Request], done: frozenset[int]) -> Iterator[list[tuple[int, Answer]]]:
        """Answers by the requests' places, some at a time, of those of the requests that are not done and that fall to
        this rank's replica (collective)."""


@dataclass(frozen=True)
class Asked:
    """Requests without repetition, and which of them each place of the original list is."""

    requests: list[Request]
    keys: list[str]
    places: list[int]

    @classmethod
    def of(cls, requests: Sequence[Request]) -> "Asked":
        """Each request once, in the order in which they first come."""
        numbers: dict[str, int] = {}
        once: list[Request] = []
        places = []
        for request in requests:
            key = digest(request)
            if key not in numbers:
                numbers[key] = len(once)
                once.append(request)
            places.append(numbers[key])
        return cls(once, list(numbers), places)


def answered(asked: Asked, journal: Journal, grid: Grid) -> frozenset[int]:
    """Which requests have an answer in the journal (rank 0 reads it; collective)."""

    def read() -> str:
        found = journal.read()
        return np.packbits([key in found for key in asked.keys]).tobytes().hex()

    bits = np.frombuffer(bytes.fromhex(main_decides(read, grid.world)), dtype=np.uint8)
    return frozenset(np.flatnonzero(np.unpackbits(bits, count=len(asked.keys))).tolist())


def answer(asked: Asked, done: frozenset[int], runner: Answering, journal: Journal, grid: Grid, show: bool) -> None:
    """Ask what is not done, and keep the answers in the journal (collective). show: a bar of progress on rank 0."""
    if len(done) == len(asked.requests):
        return
    first = main_decides(journal.next_number, grid.world)
    writes = grid.replica.rank == 0
    left = len(asked.requests) - len(done)
    hidden = not (show and grid.world.is_main and sys.stderr.isatty())
    with tqdm(total=left, unit="request", disable=hidden, dynamic_ncols=True) as bar:
        try:
            for batch in runner.answers(asked.requests, done):
                if writes:
                    journal.append(first + grid.rows.rank, [(asked.keys[i], found) for i, found in batch])
                bar.update(min(len(batch) * grid.rows.size, left - bar.n))  # the others are about as far
        finally:
            journal.close()
        gather_json(None, grid.world)  # all have written
        bar.update(left - bar.n)


def collected(asked: Asked, journal: Journal) -> list[Answer]:
    """The answers to the requests as they were first listed, from the journal. UserError where one is not there."""
    found = journal.read()
    missing = sum(key not in found for key in asked.keys)
    if missing:
        raise UserError(
            f"{journal.folder}: lacks {missing} of {len(asked.keys)} answers that the ranks have written; "
            f"it must be one folder for all machines"
        )
    return [found[asked.keys[place]] for place in asked.places]
