"""Masked rows: what is hidden is a function of seed, pass and row, in the shares that are asked for, and no control
token has a part in it.
"""

from typing import Any

import numpy as np
import pytest

from llm.batch import IGNORE
from llm.data.batch import collate
from llm.data.heldout import HeldOut
from llm.data.masked import Masked, Masking
from llm.data.rows import Row, RowSource
from llm.data.source import TokenSource
from llm.data.stream import Stream
from llm.tasks.mlm import plain_ids
from llm.tokenizer import ByteTokenizer
from llm.tokenizers.extended import with_tokens
from tests.data.helpers import make_source, random_texts

T = 64
TOKENIZER = with_tokens(ByteTokenizer(), ["<mask>"])
MASK = TOKENIZER.control_tokens["<mask>"]
CONTROL = sorted(TOKENIZER.control_tokens.values())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> TokenSource:
    return make_source(tmp_path_factory.mktemp("masked") / "source", random_texts(900), TOKENIZER)


def masked(source: TokenSource, seed: int | None = 7, **options: Any) -> Masked:
    return Masked(Stream(source, T), Masking(MASK, plain_ids(TOKENIZER), **options), seed)


def content(row: Row) -> bytes:
    return row.tokens.tobytes() + row.targets["mlm"].labels.tobytes()


def everything(rows: RowSource, epoch: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Original tokens, what the model reads, and labels of all rows, one behind the other."""
    read = [rows.read(k, epoch) for k in range(rows.n_rows)]
    assert isinstance(rows, Masked)
    original = np.concatenate([rows.inner.read(k, epoch).tokens for k in range(rows.n_rows)])
    return original, np.concatenate([r.tokens for r in read]), np.concatenate([r.targets["mlm"].labels for r in read])


def within_four_sigma(hits: int, n: int, share: float) -> bool:
    return abs(hits - n * share) <= 4 * np.sqrt(n * share * (1 - share))


def test_masks_depend_on_seed_pass_and_row_alone(source: TokenSource) -> None:
    first, again = masked(source), masked(source)
    forth = [content(first.read(k, 1)) for k in range(20)]
    back = [content(again.read(k, 1)) for k in reversed(range(20))]
    assert forth == back[::-1], "not on what was read before"
    assert len({*forth, *(content(first.read(k, 0)) for k in range(20))}) == 40, "another pass hides other tokens"
    assert content(masked(source, seed=8).read(0, 1)) != forth[0]


def test_masks_are_these_on_every_machine() -> None:
    """Golden: runs that go on depend on these bits. MASKS_VERSION is raised with any change."""
    hidden, labels = Masking(258, plain_ids(TOKENIZER), rate=0.3).hidden(np.arange(40, 80), "key")
    assert np.flatnonzero(labels >= 0).tolist() == [0, 1, 2, 6, 12, 17, 18, 31, 36]
    assert hidden[labels >= 0].tolist() == [258] * 7 + [71, 258]


def test_held_out_rows_are_masked_alike_in_every_validation(source: TokenSource) -> None:
    rows = masked(source, seed=None)
    assert content(rows.read(3, 0)) == content(rows.read(3, 5)) == content(masked(source, None).read(3, 0))
    assert HeldOut([rows], T, 10).fingerprint != HeldOut([Stream(source, T)], T, 10).fingerprint


@pytest.mark.parametrize("rate", [0.15, 0.5])
def test_as_many_tokens_are_chosen_and_changed_as_is_asked_for(source: TokenSource, rate: float) -> None:
    original, seen, labels = everything(masked(source, rate=rate))
    plain, chosen = ~np.isin(original, CONTROL), labels != IGNORE
    n = int(chosen.sum())
    assert within_four_sigma(n, int(plain.sum()), rate)
    assert within_four_sigma(int((seen[chosen] == MASK).sum()), n, 0.8)
    kept = (seen == original) & chosen
    assert within_four_sigma(int(kept.sum()), n, 0.1 + 0.1 / 256), "one random token in 256 is the original"
    assert np.array_equal(labels[chosen], original[chosen]) and np.array_equal(seen[~chosen], original[~chosen])


def test_every_position_is_chosen_as_often(source: TokenSource) -> None:
    rows = masked(source)
    chosen = np.stack([rows.read(k, 0).targets["mlm"].labels >= 0 for k in range(rows.n_rows)]).sum(0)
    plain = np.stack([~np.isin(rows.inner.read(k, 0).tokens, CONTROL) for k in range(rows.n_rows)]).sum(0)
    assert all(within_four_sigma(int(hits), int(n), 0.15) for hits, n in zip(chosen, plain, strict=True))


def test_control_tokens_are_neither_chosen_nor_drawn(source: TokenSource) -> None:
    original, seen, labels = everything(masked(source, rate=1.0, mask=0.0, random=1.0))
    control = np.isin(original, CONTROL)
    assert np.array_equal(seen[control], original[control]) and (labels[control] == IGNORE).all()
    assert (labels[~control] == original[~control]).all() and not np.isin(seen[~control], CONTROL).any()
    assert len(np.unique(seen[~control])) == 256, "any other token may be drawn"


def test_rows_see_both_ways_and_are_otherwise_those_of_their_source(source: TokenSource) -> None:
    rows, inner = masked(source), Stream(source, T)
    row, before = rows.read(5, 0), inner.read(5, 0)
    assert not row.causal and before.causal and list(row.targets) == ["mlm"]
    assert np.array_equal(row.starts, before.starts)
    assert rows.origin(5, 0, 9) == inner.origin(5, 0, 9) and rows.described() == inner.described()
    assert rows.tiles(5, 0) == 0 and rows.values == () and rows.n_rows == inner.n_rows


def test_the_fingerprint_tells_how_rows_are_masked_but_not_the_seed(source: TokenSource) -> None:
    """As of all sources: the seed stands beside it in a checkpoint."""
    known = {masked(source, **options).fingerprint for options in ({}, {"rate": 0.2}, {"mask": 0.7}, {"random": 0.2})}
    assert len(known) == 4 and Stream(source, T).fingerprint not in known
    assert masked(source, seed=1).fingerprint == masked(source, seed=2).fingerprint


def test_a_row_without_a_chosen_token_counts_nothing(source: TokenSource) -> None:
    rows = masked(source, rate=1e-9)
    batch = collate([rows.read(0, 0), rows.read(1, 0)], T, targets=rows.targets)
    assert batch.targets["mlm"].count() == 0 and list(batch.targets) == ["mlm"]
