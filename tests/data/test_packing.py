"""Plans: no row is overfull, few are, every item is in one row in every epoch, and company changes."""

import numpy as np
import pytest

from llm.data.packing import Packing

T = 1024
DRAW = np.random.default_rng(0)
LENGTHS = {
    "short": DRAW.integers(1, 200, 3000),
    "long tailed": np.minimum(T, DRAW.lognormal(5, 1, 3000).astype(np.int64) + 1),
    "of one length": np.full(700, 100),
    "whole rows": np.full(20, T),
    "one item": np.array([7]),
}


def least(lengths: np.ndarray) -> int:
    return -(-int(lengths.sum()) // T)


@pytest.mark.parametrize("name", LENGTHS)
def test_every_item_is_in_one_row_and_no_row_is_overfull_in_any_epoch(name: str) -> None:
    lengths = LENGTHS[name]
    packing = Packing(lengths, T)
    for epoch in range(3):
        items = [packing.items(row, 5, epoch) for row in range(packing.n_rows)]
        assert np.array_equal(np.sort(np.concatenate(items)), np.arange(len(lengths)))
        assert all(len(row) and int(lengths[row].sum()) <= T for row in items)
        rows = packing.row_of_items(5, epoch)
        assert all((rows[row] == number).all() for number, row in enumerate(items))


@pytest.mark.parametrize("name", ["short", "long tailed"])
def test_there_is_at_most_one_percent_of_rows_more_than_tokens_need(name: str) -> None:
    packing = Packing(LENGTHS[name], T)
    assert packing.n_rows <= max(least(LENGTHS[name]) + 1, 1.01 * least(LENGTHS[name]))
    assert packing.fill == pytest.approx(LENGTHS[name].sum() / (packing.n_rows * T))


def test_items_of_one_length_lie_as_close_as_they_can() -> None:
    assert Packing(LENGTHS["of one length"], T).n_rows == 70, "ten in a row"
    assert Packing(np.array([600, 600, 424, 424, 5]), T).n_rows == 3
    assert Packing(np.array([5, 3]), 10, together=False).n_rows == 2


def test_best_fit_is_what_it_is_one_by_one() -> None:
    lengths = LENGTHS["short"][:400]
    rooms: list[int] = []
    for length in np.sort(lengths)[::-1].tolist():
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        else:
            rooms.append(T - length)
    used = np.bincount(Packing(lengths, T).row_of_items(0, 0), lengths)
    assert len(used) == len(rooms)


def test_company_changes_with_the_epoch_and_the_seed_and_is_the_same_when_asked_again() -> None:
    lengths = LENGTHS["long tailed"]
    packing = Packing(lengths, T)
    base = packing.row_of_items(1, 0)
    for seed, epoch in ((1, 1), (2, 0)):
        other = packing.row_of_items(seed, epoch)
        one, two = (rows[:, None] == rows[None, :] for rows in (base, other))
        together = np.triu(one, 1)
        assert (together & two).sum() < 0.5 * together.sum(), "most have other company"
    assert np.array_equal(Packing(lengths, T).row_of_items(1, 0), base)
    assert np.array_equal(packing.row_of_items(1, 0), base), "also after other epochs"


def test_the_order_of_the_items_of_an_epoch_stays_what_it_is() -> None:
    packing = Packing(np.arange(1, 14), 16)
    assert [packing.items(row, 3, 1).tolist() for row in range(packing.n_rows)] == GOLDEN


GOLDEN = [[1, 12], [3, 8], [4, 10], [5, 9], [2, 11], [0, 6, 7]]  # every run on samples depends on it


def test_lengths_that_no_row_holds_are_refused() -> None:
    for lengths in ([], [0], [T + 1]):
        with pytest.raises(ValueError, match="lengths"):
            Packing(np.array(lengths, dtype=np.int64), T)
