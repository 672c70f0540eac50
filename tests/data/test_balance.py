"""Rows of a step are dealt to ranks so that tiles are even, each row once; steps without tiles keep their order."""

from typing import cast

import numpy as np
import pytest
import torch

from llm.batch import Batch, Counts
from llm.data.balance import Tiles, dealt
from llm.data.batch import StepBatch
from llm.data.loader import TrainLoader
from llm.data.mixture import Mixture
from llm.data.rows import Row, RowSource, RowTargets, TokenOrigin
from llm.datatypes import TransformerInput


def drawn(seed: int, rows: int) -> np.ndarray:
    """Tiles of rows: half have none, as text; the others up to 17."""
    random = np.random.default_rng(seed)
    return np.where(random.random(rows) < 0.5, 0, random.integers(1, 18, rows))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("ranks", "size"), [(1, 4), (2, 4), (4, 2), (3, 1)])
def test_each_row_is_dealt_once_and_ranks_are_no_less_even_than_in_order(seed: int, ranks: int, size: int) -> None:
    tiles_R = drawn(seed, 4 * ranks * size)
    places, tiles = dealt(tiles_R, ranks, size)
    assert places.shape == (4, ranks, size)
    assert sorted(places.ravel().tolist()) == list(range(len(tiles_R)))
    assert tiles.dealt.tolist() == tiles_R[places].sum((0, 2)).tolist()
    assert tiles.in_order.tolist() == tiles_R.reshape(4, ranks, size).sum((0, 2)).tolist()
    assert Tiles.imbalance(tiles.dealt) <= Tiles.imbalance(tiles.in_order) + 1e-9
    assert tiles.dealt.max() - tiles.dealt.min() <= tiles_R.max()


def test_micro_batches_that_ranks_compute_at_the_same_time_are_alike() -> None:
    tiles_R = np.array([9, 9, 0, 0, 3, 3, 0, 0])
    places, _ = dealt(tiles_R, 2, 2)
    assert tiles_R[places].sum(2).tolist() == [[9, 9], [3, 3]]


def test_a_step_without_tiles_keeps_the_order_of_the_data() -> None:
    places, tiles = dealt(np.zeros(12, dtype=np.int64), 2, 3)
    assert places.ravel().tolist() == list(range(12)) and tiles.total == 0


def test_fewer_images_than_ranks_still_deal_every_row() -> None:
    places, tiles = dealt(np.array([0, 0, 0, 5, 0, 0, 0, 0]), 4, 1)
    assert sorted(places.ravel().tolist()) == list(range(8))
    assert sorted(tiles.dealt.tolist()) == [0, 0, 0, 5]


class Pictures:
    """Rows of 8 tokens, each of its own number; row k has k % 4 tiles, all of level k."""

    fingerprint, n_rows, targets, values = "pictures", 64, ("lm",), ()

    def read(self, k: int, epoch: int) -> Row:
        tokens = np.full(8, k, dtype=np.int64)
        images = np.full((k % 4, 3, 2, 2), k, dtype=np.uint8) if k % 4 else None
        return Row(tokens, {"lm": RowTargets(tokens)}, np.zeros(1, dtype=np.int64), images=images)

    def tiles(self, k: int, epoch: int) -> int:
        return k % 4

    def origin(self, k: int, epoch: int, position: int) -> TokenOrigin:
        raise NotImplementedError

    def described(self) -> str:
        return "(pictures)"


def first_steps(ranks: int, passed_over: list[tuple[int, int]] | None = None) -> list[StepBatch]:
    """The first step of each rank."""
    found = []
    for rank in range(ranks):
        with TrainLoader(
            Mixture([("pictures", cast(RowSource, Pictures()), 1.0)], 8, seed=0),
            seq_len=8,
            global_batch_size=16,
            micro_batch_size=2,
            dp_rank=rank,
            dp_size=ranks,
            count=lambda batches: Counts(0, 0, {"lm": 0}, {}),
            passed_over=passed_over or [],
        ) as loader:
            found.append(loader.next())
    return found


def rows_of(steps: list[StepBatch]) -> list[int]:
    batches = [batch for step in steps for batch in step.micro_batches]
    return sorted(int(row) for batch in batches if batch.rows is not None for row in batch.rows.global_row)


def test_a_step_has_the_same_rows_with_their_own_images_on_every_number_of_ranks() -> None:
    for ranks in (1, 2, 4):
        steps = first_steps(ranks)
        assert rows_of(steps) == list(range(16))
        for step in steps:
            assert step.tiles is not None and step.tiles.dealt.max() - step.tiles.dealt.min() <= 3
            for batch in step.micro_batches:
                numbers = batch.inputs.tokens[:, 0].tolist()
                wanted = [level for k in numbers for level in [k] * (k % 4)]
                images = batch.inputs.images
                assert wanted == ([] if images is None else images[:, 0, 0, 0].tolist())


def test_rows_that_are_passed_over_have_no_tiles() -> None:
    whole, without = first_steps(2), first_steps(2, passed_over=[(0, 8)])
    assert rows_of(without) == list(range(16))
    tiles, rest = whole[0].tiles, without[0].tiles
    assert tiles is not None and rest is not None and 0 < rest.total < tiles.total
    assert sum(len(b.inputs.images) for s in without for b in s.micro_batches if b.inputs.images is not None) == (
        rest.total
    )


def test_a_span_of_a_batch_has_the_images_whose_slots_it_holds_and_none_is_cut() -> None:
    tokens = torch.tensor([[1, 9, 9, 2], [9, 9, 9, 9]])
    images = torch.arange(3, dtype=torch.uint8)[:, None, None, None].expand(3, 3, 2, 2)
    batch = Batch(TransformerInput(tokens, images=images), {})
    levels = {}
    for first, end in ((0, 4), (4, 8), (6, 8), (0, 1), (3, 4)):
        found = batch.span(first, end, patch_token=9).inputs.images
        levels[first, end] = None if found is None else found[:, 0, 0, 0].tolist()
    assert levels == {(0, 4): [0], (4, 8): [1, 2], (6, 8): [2], (0, 1): None, (3, 4): None}
    with pytest.raises(ValueError, match="tokens 5 to 8 of a batch begin or end inside an image"):
        batch.span(5, 8, patch_token=9)
    moved = batch.to(torch.device("cpu")).inputs.images
    assert moved is not None and torch.equal(moved, images)
