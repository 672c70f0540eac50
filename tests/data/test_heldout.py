"""The rows that a validation reads: the same on any number of ranks, each token once, filled up without labels."""

import numpy as np
import pytest
import torch

from llm.batch import IGNORE, Batch
from llm.data.heldout import HeldOut
from llm.data.source import TokenSource
from llm.tokenizer import ByteTokenizer
from tests.data.helpers import held_out_of, labels_of, make_source, random_texts, stream_of

T = 32
TEXTS = random_texts(150)
LAYOUTS = [(1, 1), (1, 8), (2, 3), (3, 4), (4, 16), (8, 5)]
"""(data-parallel ranks, micro-batch)"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> TokenSource:
    return make_source(tmp_path_factory.mktemp("heldout") / "source", TEXTS, shard_bytes=4000)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> TokenSource:
    return make_source(tmp_path_factory.mktemp("heldout") / "other", random_texts(20, seed=1))


def all_ranks(held_out: HeldOut, ranks: int, micro: int) -> list[list[Batch]]:
    return [list(held_out.batches(micro, rank, ranks)) for rank in range(ranks)]


def rows_with_labels(held_out: HeldOut, ranks: int, micro: int) -> list[bytes]:
    """Tokens and labels of every row that has a label, in any order, from all ranks."""
    batches = [batch for of_rank in all_ranks(held_out, ranks, micro) for batch in of_rank]
    rows = torch.cat([torch.cat([batch.inputs.tokens, labels_of(batch)], 1) for batch in batches])
    return sorted(row.tobytes() for row in rows[(rows[:, T:] != IGNORE).any(1)].numpy())


@pytest.mark.parametrize("limit", [None, 1, 10, 100])
def test_every_layout_reads_the_same_rows(source: TokenSource, other: TokenSource, limit: int | None) -> None:
    held_out = held_out_of([source, other], T, limit)
    expected = rows_with_labels(held_out, 1, held_out.n_rows)
    assert len(expected) == held_out.n_rows == (held_out.total if limit is None else limit)
    for ranks, micro in LAYOUTS:
        assert len({len(of_rank) for of_rank in all_ranks(held_out, ranks, micro)}) == 1, "all join every forward"
        assert rows_with_labels(held_out, ranks, micro) == expected


@pytest.mark.parametrize(("ranks", "micro"), LAYOUTS)
def test_all_rows_have_every_token_as_a_target_once(source: TokenSource, ranks: int, micro: int) -> None:
    batches = all_ranks(held_out_of([source], T, None), ranks, micro)
    labels = torch.cat([labels_of(batch) for step in zip(*batches, strict=True) for batch in step]).reshape(-1).numpy()
    stream = stream_of(TEXTS)
    assert np.array_equal(labels[labels >= 0], stream[stream != ByteTokenizer.bos_id])


@pytest.mark.parametrize(("ranks", "micro"), LAYOUTS)
def test_batches_say_which_rows_of_which_source_they_hold(
    source: TokenSource, other: TokenSource, ranks: int, micro: int
) -> None:
    held_out, seen = held_out_of([source, other], T, 40), []
    for batch in [batch for of_rank in all_ranks(held_out, ranks, micro) for batch in of_rank]:
        assert batch.rows is not None
        for tokens, number, row, place in zip(
            batch.inputs.tokens, batch.rows.source, batch.rows.row, batch.rows.global_row, strict=True
        ):
            if number < 0:
                assert row == place == -1
                continue
            expected = held_out.sources[number].read(int(row), 0).tokens
            assert np.array_equal(tokens.numpy()[: len(expected)], expected)
            seen.append(int(place))
    assert sorted(seen) == list(range(40)), "each once"


def test_what_fills_the_last_row_is_a_segment_of_its_own(source: TokenSource) -> None:
    (batches,) = all_ranks(held_out_of([source], T, None), ranks=1, micro=4)
    last = batches[-1]
    n_real = source.n_tokens - (len(batches) - 1) * 4 * T
    assert n_real % T > 0 and n_real < 4 * T
    assert n_real in last.inputs.cu_seqlens.tolist()
    assert (labels_of(last).reshape(-1)[n_real - 1 :] == IGNORE).all()
    assert set(range(0, 4 * T + 1, T)) <= set(last.inputs.cu_seqlens.tolist())


def test_some_rows_are_spread_over_all_sources_and_more_rows_contain_them(
    source: TokenSource, other: TokenSource
) -> None:
    few, more = held_out_of([source, other], T, 40), held_out_of([source, other], T, 80)
    assert set(rows_with_labels(few, 1, 8)) < set(rows_with_labels(more, 1, 8))
    every, small = set(rows_with_labels(held_out_of([source], T, None), 1, 8)), set(rows_with_labels(few, 1, 8))
    assert len(small & every) > 20 and small - every, "rows of both"
    first_rows = {row for row in rows_with_labels(held_out_of([source], T, 40), 1, 8)}
    assert len(first_rows & set(rows_with_labels(few, 1, 8))) < 40, "not just the beginning of the first"


def test_the_fingerprint_is_that_of_the_rows(source: TokenSource, other: TokenSource) -> None:
    base = held_out_of([source, other], T, 40).fingerprint
    assert held_out_of([other, source], T, 40).fingerprint == base, "the order in the config changes no row"
    changed = [
        held_out_of([source], T, 40), held_out_of([source, other], T, 41), held_out_of([source, other], T // 2, 40),
    ]  # fmt: skip
    assert len({held_out.fingerprint for held_out in changed} | {base}) == 4
    whole = held_out_of([source, other], T, None)
    assert held_out_of([source, other], T, whole.total).fingerprint == whole.fingerprint
    assert held_out_of([source, other], T, 10**9).fingerprint == whole.fingerprint, "no more than there are"


def test_it_says_how_many_of_how_many(source: TokenSource) -> None:
    total = held_out_of([source], T, None).total
    assert held_out_of([source], T, 7).described() == f"7 of {total} held-out rows"
    assert held_out_of([source], T, total).described() == f"all {total} held-out rows"
