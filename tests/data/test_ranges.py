"""Ranges of rows that are passed over, and what a step that has some of them is made of."""

from pathlib import Path

import pytest
import torch

from llm.batch import IGNORE
from llm.data.batch import StepBatch
from llm.data.loader import TrainLoader
from llm.data.mixture import Mixture
from llm.data.ranges import Range, described, merged, within
from tests.data.helpers import LM, labels_of, make_source, mixture_of, random_texts

T = 16
G = 8


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    folder: Path = tmp_path_factory.mktemp("ranges")
    return mixture_of([("a", make_source(folder / "a", random_texts(60)), 1.0)], T, seed=0)


def steps_of(
    mixture: Mixture, passed_over: list[Range], n: int, ranks: int = 1, size: int = G
) -> list[list[StepBatch]]:
    """Each rank's first `n` steps of `size` rows, in micro-batches of 2."""
    found = []
    for rank in range(ranks):
        with TrainLoader(
            mixture, seq_len=T, global_batch_size=size, micro_batch_size=2, dp_rank=rank, dp_size=ranks, count=LM.count,
            passed_over=passed_over,
        ) as loader:  # fmt: skip
            found.append([loader.next() for _ in range(n)])
    return found


def trained(steps: list[list[StepBatch]]) -> list[bytes]:
    """Tokens and labels of all rows with labels, in any order."""
    rows = [
        torch.cat([batch.inputs.tokens, labels_of(batch)], 1)
        for of_rank in steps
        for step in of_rank
        if not step.is_passed_over
        for batch in step.micro_batches
    ]
    every = torch.cat(rows)
    return sorted(row.tobytes() for row in every[(every[:, T:] != IGNORE).any(1)].numpy())


def test_ranges_are_merged_clipped_and_named() -> None:
    assert merged([(8, 16), (0, 3), (15, 20), (20, 21), (5, 5)]) == [(0, 3), (8, 21)]
    assert within([(0, 3), (8, 21)], 2, 10) == [(2, 3), (8, 10)] and within([(0, 3)], 3, 9) == []
    assert described([(0, 3), (8, 9)]) == "rows 0 to 2, 8"


def test_a_step_within_a_range_is_passed_over_and_shows_its_rows(mixture: Mixture) -> None:
    (plain,), (step,) = steps_of(mixture, [], 2)[0][1:], steps_of(mixture, [(8, 16)], 2)[0][1:]
    assert step.is_passed_over and step.passed_over == ((8, 16),)
    assert torch.equal(step.micro_batches[0].inputs.tokens, plain.micro_batches[0].inputs.tokens)


def test_of_a_step_with_some_of_the_rows_the_others_are_trained_on(mixture: Mixture) -> None:
    plain, step = steps_of(mixture, [], 2)[0][1], steps_of(mixture, [(3, 11)], 2)[0][1]
    assert step.passed_over == ((8, 11),) and not step.is_passed_over
    labels, before = (torch.cat([labels_of(m) for m in batch.micro_batches]) for batch in (step, plain))
    assert (labels[:3] == IGNORE).all() and torch.equal(labels[3:], before[3:])
    tokens = torch.cat([m.inputs.tokens for m in step.micro_batches])
    assert (tokens[:3] == mixture.fill).all(), "no router sees what they say, either"
    assert (step.counts.targets, step.counts.tokens) == (int((before[3:] >= 0).sum()), plain.counts.tokens)


@pytest.mark.parametrize("size", [4, 8, 16, 24])
@pytest.mark.parametrize("ranks", [1, 2])
def test_any_batch_size_and_layout_trains_on_the_same_rows(mixture: Mixture, size: int, ranks: int) -> None:
    passed_over = [(5, 14), (16, 24), (30, 31)]
    rows = [row for row in range(48) if not any(first <= row < end for first, end in passed_over)]
    (every,) = steps_of(mixture, [], 6)
    batches = [batch for step in every for batch in step.micro_batches]
    tokens = torch.cat([torch.cat([batch.inputs.tokens, labels_of(batch)], 1) for batch in batches])[rows]
    expected = sorted(row.tobytes() for row in tokens[(tokens[:, T:] != IGNORE).any(1)].numpy())
    assert trained(steps_of(mixture, passed_over, 48 // size, ranks, size)) == expected
