"""Global rows: proportions, epochs, independence of sources, what a checkpoint keeps."""

import time

import numpy as np
import pytest

from llm.data.mixture import CYCLE, Mixture
from llm.data.source import TokenSource
from llm.errors import UserError
from tests.data.helpers import make_source, mixture_of, random_texts

T = 16


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[TokenSource]:
    folder = tmp_path_factory.mktemp("sources")
    return [make_source(folder / name, random_texts(n, seed=n)) for name, n in (("a", 40), ("b", 100), ("c", 7))]


def rows_of(mixture: Mixture, number: int, stop: int) -> np.ndarray:
    """The rows asked of one source in global rows 0..stop-1."""
    source, row, _ = mixture.locate(np.arange(stop))
    return row[source == number]


def test_one_epoch_of_a_single_source_has_every_row_once(sources: list[TokenSource]) -> None:
    mixture = mixture_of([("a", sources[0], 1.0)], T, seed=0)
    for epoch in range(3):
        _, row, _ = mixture.locate(np.arange(epoch * mixture.n_rows, (epoch + 1) * mixture.n_rows))
        assert np.array_equal(np.sort(row), np.arange(mixture.n_rows))


def test_every_epoch_has_another_order(sources: list[TokenSource]) -> None:
    mixture = mixture_of([("a", sources[0], 1.0)], T, seed=0)
    n = mixture.n_rows
    assert not np.array_equal(mixture.locate(np.arange(n))[1], mixture.locate(np.arange(n, 2 * n))[1])


def test_each_source_of_a_mixture_has_whole_epochs(sources: list[TokenSource]) -> None:
    mixture = mixture_of([("a", sources[0], 1.0), ("b", sources[1], 2.5), ("c", sources[2], 0.5)], T, seed=0)
    for number, n in enumerate(mixture.rows_of):
        rows = rows_of(mixture, number, 2 * CYCLE)
        for begin in range(0, len(rows) - n, n):
            assert np.array_equal(np.sort(rows[begin : begin + n]), np.arange(n))


def test_counts_are_exact_in_every_cycle(sources: list[TokenSource]) -> None:
    mixture = mixture_of([("a", sources[0], 1.0), ("b", sources[1], 2.0), ("c", sources[2], 0.5)], T, seed=0)
    assert mixture.slots == [1170, 2341, 585]  # 4096 x 2/7, 4/7, 1/7 = 1170.29, 2340.57, 585.14
    for cycle in (0, 1, 12_345):
        source, _, _ = mixture.locate(np.arange(cycle * CYCLE, (cycle + 1) * CYCLE))
        assert np.bincount(source).tolist() == mixture.slots


def test_a_source_keeps_its_order_when_others_join(sources: list[TokenSource]) -> None:
    alone = mixture_of([("a", sources[0], 1.0)], T, seed=0)
    joined = mixture_of([("b", sources[1], 3.0), ("a", sources[0], 1.0)], T, seed=0)
    of_a = rows_of(joined, 1, 2 * CYCLE)
    assert np.array_equal(of_a, rows_of(alone, 0, len(of_a)))


def test_rows_asked_in_any_way_are_the_same(sources: list[TokenSource]) -> None:
    mixture = mixture_of([("a", sources[0], 1.0), ("b", sources[1], 2.0)], T, seed=5)
    whole = np.stack(mixture.locate(np.arange(3 * CYCLE)))
    picked = np.random.default_rng(0).permutation(3 * CYCLE)[:200]
    assert np.array_equal(np.stack(mixture.locate(picked)), whole[:, picked])


def test_a_far_row_is_found_at_once(sources: list[TokenSource]) -> None:
    mixture = mixture_of([("a", sources[0], 1.0), ("b", sources[1], 2.0)], T, seed=5)
    began = time.process_time()
    mixture.locate(987_654_321_012)
    assert time.process_time() - began < 1.0  # milliseconds; anything that walks there would take days


def test_a_source_shorter_than_a_row_is_refused_by_name(sources: list[TokenSource]) -> None:
    with pytest.raises(UserError, match=r"source b .* too few .*seq_len=100000"):
        mixture_of([("b", sources[1], 1.0)], 100_000, seed=0)


def test_a_weight_too_small_to_be_read_is_refused_by_name(sources: list[TokenSource]) -> None:
    with pytest.raises(UserError, match="data source b: its weight"):
        mixture_of([("a", sources[0], 1.0), ("b", sources[1], 1e-5)], T, seed=0)


def test_two_sources_of_one_name_are_refused(sources: list[TokenSource]) -> None:
    with pytest.raises(UserError, match="different names"):
        mixture_of([("a", sources[0], 1.0), ("a", sources[1], 1.0)], T, seed=0)


def test_a_state_goes_on_with_the_same_data(sources: list[TokenSource]) -> None:
    parts = [("a", sources[0], 1.0), ("b", sources[1], 2.0)]
    mixture_of(parts, T, seed=5).check_state(mixture_of(parts, T, seed=5).state(consumed=77))


def test_all_differences_to_a_state_are_named(sources: list[TokenSource]) -> None:
    state = mixture_of([("a", sources[0], 1.0), ("b", sources[1], 1.0)], T, seed=5).state(consumed=77)
    with pytest.raises(UserError) as caught:
        mixture_of([("a", sources[2], 1.0), ("b", sources[1], 1.0)], 2 * T, seed=6).check_state(state)
    assert all(part in str(caught.value) for part in ("seed: 5", "data.seq_len: 16", "data.sources.a.fingerprint"))
    assert "sources.b" not in str(caught.value)
