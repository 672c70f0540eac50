"""Each request that differs is asked once, over any number of starts."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from llm.errors import UserError
from llm.evaluate.answer import Asked, answer, answered, collected
from llm.evaluate.journal import Journal
from llm.evaluate.requests import Answer, Continue, Request, Score, Scored
from llm.generation.sampling import Sampling
from llm.parallel.grid import make_grid
from llm.parallel.launch.world import World

GRID = make_grid(World(0, 1, 0, torch.device("cpu")))
REQUESTS: list[Request] = [Score((1, i % 7), (i % 5,)) for i in range(50)]


class Killed(Exception):
    """In place of a signal."""


class Counting:
    """Answers by the request alone, three at a time; is killed once it has given so many batches."""

    def __init__(self, batches: int | None = None) -> None:
        self.batches, self.asked = batches, []

    def answers(self, requests: Sequence[Request], done: frozenset[int]) -> Iterator[list[tuple[int, Answer]]]:
        left = [i for i in range(len(requests)) if i not in done]
        for n, at in enumerate(range(0, len(left), 3)):
            if n == self.batches:
                raise Killed
            batch = left[at : at + 3]
            self.asked += batch
            yield [(i, Scored(-float(hash(requests[i]) % 1000), False)) for i in batch]


def journal_in(folder: Path) -> Journal:
    journal = Journal(folder)
    journal.open({"the model": "m"}, "files", "m")
    return journal


def test_equal_requests_are_asked_once_and_each_place_has_its_answer(tmp_path):
    asked, journal, runner = Asked.of(REQUESTS), journal_in(tmp_path), Counting()
    answer(asked, frozenset(), runner, journal, GRID, show=False)
    assert len(runner.asked) == len(asked.requests) == len(set(REQUESTS)) == 35
    assert collected(asked, journal) == [Scored(-float(hash(request) % 1000), False) for request in REQUESTS]


def test_samples_that_draw_otherwise_are_different_requests():
    draws = [Sampling(temperature=1.0, seed=seed) for seed in (0, 1)]
    drawn = [Continue((1, 2), 8, sampling=sampling, sample=n) for sampling in draws for n in (0, 1)]
    assert len(Asked.of([*drawn, *drawn]).requests) == 4


def test_starts_that_are_killed_ask_together_what_one_would(tmp_path):
    asked, runners = Asked.of(REQUESTS), [Counting(batches) for batches in (0, 1, 4, 2, None)]
    for runner in runners:
        journal = journal_in(tmp_path)
        done = answered(asked, journal, GRID)
        if runner.batches is None:
            answer(asked, done, runner, journal, GRID, show=False)
        else:
            with pytest.raises(Killed):
                answer(asked, done, runner, journal, GRID, show=False)
    every = [index for runner in runners for index in runner.asked]
    assert sorted(every) == list(range(len(asked.requests)))
    assert collected(asked, journal) == [Scored(-float(hash(request) % 1000), False) for request in REQUESTS]


def test_nothing_is_asked_where_all_is_answered(tmp_path):
    asked, journal = Asked.of(REQUESTS), journal_in(tmp_path)
    answer(asked, frozenset(), Counting(), journal, GRID, show=False)
    done = answered(asked, journal, GRID)
    again = Counting()
    answer(asked, done, again, journal, GRID, show=False)
    assert len(done) == len(asked.requests) and again.asked == []


def test_an_answer_that_is_not_in_the_journal_is_missed(tmp_path):
    asked, journal = Asked.of(REQUESTS), journal_in(tmp_path)
    answer(asked, frozenset({3, 4}), Counting(), journal, GRID, show=False)
    with pytest.raises(UserError, match="lacks 2 of 35 answers"):
        collected(asked, journal)
