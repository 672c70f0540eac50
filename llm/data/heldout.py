"""The held-out rows that a validation reads: a fixed choice from all rows of all held-out sources, whatever the layout.

The rows of all sources, one source after the other, have one held-out order: a permutation that depends on their number
alone, not on train.seed, ranks or micro-batches. The first `eval.rows` of it count. They are read in the order in which
they lie on disk and cut over the ranks like a training step; what the last micro-batches lack is filled up without
labels, so that every rank has as many of them.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from llm.batch import Batch, Rows
from llm.data.batch import collate
from llm.data.order import ORDER_VERSION, permute, round_keys
from llm.data.rows import Row, RowSource, features_in


class HeldOut:
    """The first `limit` rows (None: all) of the held-out order over `sources`, of whatever kinds, rows being at most
    `seq_len` tokens, and `source_len` on the side of an encoder where there is one, and filled up with `fill`.

    names: what its user calls each of `sources`, in their order here; empty where nobody asks. n_rows: how many rows
    that are, of the `total` there are. fingerprint: digest of what they are made of; equal where two
    validations read the same rows.

    The rows are those of a source's first pass.
    """

    def __init__(
        self,
        sources: Sequence[RowSource],
        seq_len: int,
        limit: int | None,
        fill: int = 0,
        names: Sequence[str] = (),
        source_len: int | None = None,
    ) -> None:
        order = sorted(range(len(sources)), key=lambda i: sources[i].fingerprint)  # the config's does not matter
        self.sources = [sources[i] for i in order]
        self.names = [names[i] for i in order] if names else []
        self.seq_len, self.source_len = seq_len, source_len
        self.fill = fill
        self.targets = tuple(dict.fromkeys(name for source in self.sources for name in source.targets))
        counts = [source.n_rows for source in self.sources]
        self.total = sum(counts)
        self.n_rows = self.total if limit is None else min(limit, self.total)
        if self.n_rows == self.total:
            self._rows = np.arange(self.total)
        else:
            keys = round_keys("held-out", self.total)
            self._rows = np.sort(permute(np.arange(self.n_rows), self.total, keys))
        self._ends = np.cumsum(counts)
        parts = [ORDER_VERSION, seq_len, self.n_rows, [source.fingerprint for source in self.sources]]
        parts += [] if source_len is None else [source_len]
        self.fingerprint = hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()

    @property
    def values(self) -> tuple[str, ...]:
        """Names of the values that rows have; those of some sources are only known when a run has begun."""
        return tuple(dict.fromkeys(name for source in self.sources for name in source.values))

    def batches(self, micro_batch_size: int, dp_rank: int, dp_size: int) -> Iterator[Batch]:
        """The micro-batches of one of `dp_size` data-parallel ranks; as many on each of them."""
        for start in range(0, self.n_rows, micro_batch_size * dp_size):
            first = start + dp_rank * micro_batch_size
            places = np.arange(first, first + micro_batch_size)
            source, row = self.locate(places)
            rows = [self._read(*place) for place in zip(source.tolist(), row.tolist(), strict=True)]
            named = self.targets, self.values, features_in(self.sources), self.source_len
            batch = collate(rows, self.seq_len, self.fill, None, *named)
            number = np.where(source < 0, -1, places)
            yield replace(batch, rows=Rows(source, row, number, np.zeros_like(number)))

    def locate(self, places: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(number of the source, row in it) of each of the rows that count, by their numbers; -1 behind the last."""
        there = places < self.n_rows
        row = np.where(there, self._rows[np.minimum(places, self.n_rows - 1)], -1)
        source = np.where(there, self._ends.searchsorted(row, side="right"), -1)
        before = np.concatenate([[0], self._ends])[source]
        return source, np.where(there, row - before, -1)

    def _read(self, source: int, row: int) -> Row | None:
        return None if source < 0 else self.sources[source].read(row, 0)

    def described(self) -> str:
        """How much a validation reads, in words."""
        if self.n_rows == self.total:
            return f"all {self.total:,} held-out rows"
        return f"{self.n_rows:,} of {self.total:,} held-out rows"
