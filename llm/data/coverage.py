"""Which rows of its sources a run has read, and how often: counted from the order of rows (llm/data/mixture.py), which
is a function of the seed, so that nothing had to be recorded.

A row of T tokens of text is counted with every file that any of its T inputs comes from. Samples, which share rows with
others in every epoch, are counted themselves.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, NamedTuple

import numpy as np

from llm.data.mixture import CYCLE
from llm.data.order import ORDER_VERSION, permute, round_keys
from llm.data.packed import Packed
from llm.data.rows import Origin, RowSource
from llm.data.source import TokenSource
from llm.data.stream import Stream
from llm.errors import UserError

CHUNK = 1 << 20  # rows that are permuted at once


@dataclass(frozen=True)
class Stretch:
    """Neighbouring documents, or items of samples, of one shard that come from one file.

    lines: first and last line (JSONL) or row (Parquet) from 1; None where the file is one document.
    rows: first and last row of the source with any of their tokens; None where they lie behind the last whole row, and
    for samples. times: how many of these rows, or of the items, were read how often.
    """

    shard: str
    file: str
    lines: tuple[int, int] | None
    documents: int
    rows: tuple[int, int] | None
    times: dict[int, int]


def rows_asked(state: dict[str, Any], names: Sequence[str]) -> dict[str, int]:
    """How many rows each source has given, repeated ones included, at the place in the order that `state` (of
    `Mixture.state`) stands at.

    `names` are the sources in the order of the config, which decides whose a slot of a cycle is. UserError when they
    are not those of the state, or another version of the order made it.
    """
    if state["order_version"] != ORDER_VERSION or state["data"]["cycle"] != CYCLE:
        raise UserError(
            f"the order of rows is version {state['order_version']} with cycles of {state['data']['cycle']}; "
            f"known is version {ORDER_VERSION} with cycles of {CYCLE}"
        )
    sources = state["data"]["sources"]
    if sorted(names) != sorted(sources):
        raise UserError(f"the sources read are {', '.join(sources)}, those of the config {', '.join(names)}")
    slots = [sources[name]["slots"] for name in names]
    cycle, rest = divmod(state["consumed"], CYCLE)
    shuffled = permute(np.arange(CYCLE), CYCLE, round_keys(state["seed"], "mixture", cycle))
    source_of_slot = np.searchsorted(np.cumsum(slots), shuffled, side="right")
    begun = np.bincount(source_of_slot[:rest], minlength=len(slots)).tolist()
    return {name: cycle * n + more for name, n, more in zip(names, slots, begun, strict=True)}


class Coverage:
    """How often each row of the source `name` has been read, after it gave `asked` rows: all of them `passes` times,
    and those where `again` is true once more.
    """

    def __init__(self, name: str, rows: RowSource, seed: int, asked: int) -> None:
        self.rows, self.n_rows = rows, rows.n_rows
        if self.n_rows == 0:
            raise UserError(f"source {name} {rows.described()}, and no row of them")
        self.passes, begun = divmod(asked, self.n_rows)
        self.again = np.zeros(self.n_rows, dtype=bool)
        keys = round_keys(seed, "source", name, self.passes)
        for first in range(0, begun, CHUNK):
            self.again[permute(np.arange(first, min(first + CHUNK, begun)), self.n_rows, keys)] = True

    def times(self, first: int = 0, stop: int | None = None) -> dict[int, int]:
        """How many of the rows [first, stop) were read how often, the most often read ones first."""
        part = self.again[first:stop]
        more = int(np.count_nonzero(part))
        counts = {self.passes + 1: more, self.passes: len(part) - more}
        return {times: rows for times, rows in counts.items() if rows}

    def stretches(self, progress: Callable[[int], object] = lambda documents: None) -> Iterator[Stretch]:
        """All documents or items of the source in its order, file by file; `progress` gets how many were looked at.
        None of kinds whose rows are made of neither. UserError naming the shard that proves damaged.
        """
        if isinstance(self.rows, Stream):
            yield from self._of_text(self.rows, progress)
        elif isinstance(self.rows, Packed):
            yield from self._of_samples(self.rows, progress)

    def _of_samples(self, packed: Packed, progress: Callable[[int], object]) -> Iterator[Stretch]:
        times = packed.times(self.passes, self.again)
        places = zip(packed.source.items(), times.tolist(), strict=True)
        for (shard, file), found in groupby(places, key=lambda place: (place[0][0], place[0][1].file)):
            items = list(found)
            counts = Counter(read for _, read in items)
            rows = [origin.row for (_, origin), _ in items if origin.row is not None]
            yield Stretch(
                shard=shard,
                file=file,
                lines=(rows[0], rows[-1]) if rows else None,
                documents=len(items),
                rows=None,
                times=dict(sorted(counts.items(), reverse=True)),
            )
            progress(len(items))

    def _of_text(self, stream: Stream, progress: Callable[[int], object]) -> Iterator[Stretch]:
        seq_len = stream.seq_len
        places_of = _documents(stream.source)
        for (shard, file), found in groupby(places_of, key=lambda place: (place.shard, place.origin.file)):
            places = list(found)
            start, stop, row = places[0].start, places[-1].stop, places[0].origin.row
            first, last = start // seq_len, min((stop - 1) // seq_len, self.n_rows - 1)
            yield Stretch(
                shard=shard,
                file=file,
                lines=None if row is None else (row, places[-1].origin.row or row),
                documents=len(places),
                rows=(first, last) if first <= last else None,
                times=self.times(first, last + 1) if first <= last else {},
            )
            progress(len(places))

class _Place(NamedTuple):
    """Where a document lies: tokens [start, stop) of the source."""

    shard: str
    origin: Origin
    start: int
    stop: int


def _documents(source: TokenSource) -> Iterator[_Place]:
    numbers = iter(range(source.n_docs))
    position = 0
    for entry in source.manifest.shards:
        for number in islice(numbers, entry.documents):
            stop = position + source.document_length(number)
            yield _Place(entry.name, source.origin(number), position, stop)
            position = stop
