"""The keyed permutation: every run's order of data hangs on it."""

import numpy as np
import pytest

from llm.data.order import ROUNDS, permute, round_keys


@pytest.mark.parametrize("n", [1, 2, 3, 5, 12, 255, 256, 257, 1000, 4096, 65_537])
def test_every_row_comes_exactly_once(n: int) -> None:
    image = permute(np.arange(n), n, round_keys(7, "source", "a", 0))
    assert np.array_equal(np.sort(image), np.arange(n))


def test_the_order_is_the_one_of_version_1() -> None:
    # Golden vectors: a change here changes the data order of every run and must raise ORDER_VERSION.
    keys = round_keys(0, "source", "books", 3)
    assert keys[0] == 15635038612619851846
    assert permute(np.arange(12), 12, keys).tolist() == [1, 10, 6, 7, 5, 3, 4, 2, 11, 8, 9, 0]
    assert permute(np.array([0, 1, 2, 999_999_999]), 10**9, keys).tolist() == [
        195554810,
        519450979,
        367840656,
        952401912,
    ]
    assert permute(np.array([0, 1, 10**17]), (1 << 62) - 57, keys).tolist() == [
        4173329012004240313,
        3434957012460859214,
        4273281876115201601,
    ]


def test_keys_given_per_index_act_like_keys_given_alone() -> None:
    keys = [round_keys(1, "source", "a", epoch) for epoch in range(5)]
    index = np.arange(50)
    together = permute(index, 50, np.stack([keys[i % 5] for i in index], axis=1))
    assert together.tolist() == [int(permute(np.array([i]), 50, keys[i % 5])[0]) for i in index]


@pytest.mark.parametrize("part", [0, 1, 2])
def test_seed_name_and_epoch_each_change_the_order(part: int) -> None:
    parts: list[int | str] = [0, "a", 0]
    other = list(parts)
    other[part] = "b" if part == 1 else 1
    n = 1000
    same = permute(np.arange(n), n, round_keys(*parts)) == permute(np.arange(n), n, round_keys(*other))
    assert same.sum() < 15  # two independent orders of n rows agree in 1 place on average


def test_a_number_and_its_text_name_different_orders() -> None:
    assert not np.array_equal(round_keys(1, "a"), round_keys("1", "a"))


def test_places_and_images_are_independent() -> None:
    # 64 x 64 table of (place, image): chi-squared per degree of freedom is 1 +- 0.022 (one sigma) for a random order.
    n = 1 << 18
    image = permute(np.arange(n), n, round_keys(3, "source", "a", 0))
    table = np.histogram2d(np.arange(n), image, bins=64)[0]
    expected = n / 64**2
    assert 0.9 < ((table - expected) ** 2 / expected).sum() / 63**2 < 1.1


@pytest.mark.parametrize(("index", "n"), [([5], 5), ([-1], 5), ([0], 0)])
def test_a_row_outside_is_refused(index: list[int], n: int) -> None:
    with pytest.raises(ValueError):
        permute(np.array(index), n, np.zeros(ROUNDS, dtype=np.uint64))
