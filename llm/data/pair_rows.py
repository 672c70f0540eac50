"""Pairs as rows for an encoder-decoder: each whole, its target in the row and its source on the row's other side, as
many in a row as find room on both.

An item of the source of samples is a pair: first the source, of m tokens, which takes m positions; then the target, of
n tokens, which takes n - 1, as its last token is only a label.
"""

import numpy as np
from numpy.typing import NDArray

from llm.data.labels import MaxLength
from llm.data.packed import Packed, Shortened
from llm.data.pair_packing import PairPacking
from llm.data.rows import Row, RowTargets, SourceSide, TokenOrigin
from llm.data.samples import SampleSource
from llm.errors import UserError

SEQ2SEQ = "seq2seq"
"""The targets of rows with sources."""


class PairRows(Packed):
    """Rows of `seq_len` positions for targets and `source_len` for sources of the pairs of a source of samples."""

    cut_where = "cut after the beginning of each side that is too long"
    packing: PairPacking

    def __init__(
        self,
        source: SampleSource,
        seq_len: int,
        source_len: int,
        seed: int,
        *,
        together: bool = True,
        max_length: MaxLength = "error",
        given: str = "",
    ) -> None:
        """UserError naming file and row where a pair does not fit and max_length is `error`, or where none fits."""
        self.source_len = source_len
        super().__init__(source, seq_len, seed, target=SEQ2SEQ, together=together, max_length=max_length, given=given)
        self.values = ()

    def read(self, k: int, epoch: int) -> Row:
        sides: tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]] = [], []
        labels = []
        for item in self.items(k, epoch).tolist():
            source, target = (self.source.sample(2 * item + i).tokens[: self._kept[item, i]] for i in (0, 1))
            sides[0].append(source)
            sides[1].append(target[:-1])
            labels.append(target[1:])
        (sources, source_starts), (targets, starts) = map(_joined, sides)
        return Row(
            targets, {SEQ2SEQ: RowTargets(np.concatenate(labels))}, starts, source=SourceSide(sources, source_starts)
        )

    def origin(self, k: int, epoch: int, position: int) -> TokenOrigin:
        """Of a token of the target."""
        at = 0
        for item in self.items(k, epoch).tolist():
            length = int(self._kept[item, 1]) - 1
            if position < at + length:
                n_tokens = len(self.source.sample(2 * item + 1).tokens)
                return TokenOrigin(self.source.origin(2 * item), item, position - at, n_tokens)
            at += length
        raise IndexError(f"position {position} of a row with {at}")

    def described(self) -> str:
        return f"({self.given}) has {self.source.n_items} pairs"

    def _packing(self, kept: NDArray[np.int64], together: bool) -> PairPacking:
        return PairPacking(kept[:, 1] - 1, kept[:, 0], self.seq_len, self.source_len, together)

    def _fitted(self, kept: NDArray[np.int64], max_length: MaxLength) -> list[Shortened]:
        most = np.array([self.source_len, self.seq_len + 1])
        long = np.flatnonzero((kept > most).any(1))
        self._lengths = {item: kept[item].copy() for item in long.tolist()}
        whole = kept[long].sum(1) - 1
        kept[long] = np.minimum(kept[long], most) if max_length == "cut" else 0
        left = np.maximum(kept[long].sum(1) - 1, 0)
        found = [Shortened(*entry) for entry in zip(long.tolist(), whole.tolist(), left.tolist(), strict=True)]
        if found and max_length == "error":
            raise UserError(
                f"{self.given}: {len(found):,} of {len(kept):,} pairs are longer than a row of {self._row_size()}: "
                f"{self._listed(found)}; raise these, or set pair.max_length to drop or cut"
            )
        return found

    def _row_size(self) -> str:
        return f"train.seq_len={self.seq_len} for targets and data.source_len={self.source_len} for sources"

    def _used(self) -> str:
        return (
            f"{self.seq_len:,} positions for targets, {self.fill:.2%} of them used, and {self.source_len:,} for "
            f"sources, {self.packing.source_fill:.2%} used"
        )

    def _size(self, entry: Shortened) -> str:
        source, target = self._lengths[entry.item].tolist()
        return f"source {source:,}, target {target - 1:,} tokens with their ends"

    def _is_bare(self, cut: Shortened) -> bool:
        return False


def source_of(row: Row, number: int) -> NDArray[np.int64]:
    """The source tokens of a row's document `number`, from 0."""
    assert row.source is not None
    bounds = [*row.source.starts.tolist(), len(row.source.tokens)]
    return row.source.tokens[bounds[number] : bounds[number + 1]]


def _joined(parts: list[NDArray[np.int64]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens of all parts, and where each begins."""
    return np.concatenate(parts), np.cumsum([0, *map(len, parts[:-1])])
