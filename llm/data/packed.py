"""Samples as rows: each whole, side by side with others and blind to them, as many in a row as find room.

A sample of n tokens takes n - 1 positions: its last token is only a label. A pair is one item, its two samples side by
side in one row.

Shapes: T row length, n positions in use, S pixels a side of a tile.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llm.batch import IGNORE
from llm.data.labels import MaxLength
from llm.data.packing import PACKING_VERSION, Packing
from llm.data.rows import Row, RowTargets, TokenOrigin
from llm.data.samples import SampleSource, digest_of
from llm.errors import UserError

NAMED = 5
"""Rows that a message lists."""
PAIR = "pair"
"""The values of rows of pairs: +p at the positions of the first sample of the row's p-th pair, -p at its second."""


@dataclass(frozen=True)
class Shortened:
    """What was done to an item that does not fit into a row. tokens: of its longest sample; kept: of them, 0 where it
    was left out.
    """

    item: int
    tokens: int
    kept: int


class Packed:
    """Rows of `seq_len` positions of the samples of a source.

    fill: share of the positions that are used. shortened: the items that were cut or left out, by chat.max_length.
    """

    max_length_key = "chat.max_length"
    most = "train.seq_len + 1"
    """What a sample may have of tokens, in words; `extra` more than a row's positions."""
    extra = 1
    cut_where = "cut at the end of a turn"

    def __init__(
        self,
        source: SampleSource,
        seq_len: int,
        seed: int,
        *,
        target: str = "lm",
        together: bool = True,
        max_length: MaxLength = "error",
        given: str = "",
    ) -> None:
        """target: what the labels are called; together: False for one item a row; given: what its user calls the
        source.

        UserError naming file and row where a sample does not fit and max_length is `error`, or where none fits.
        """
        self.source, self.seq_len, self.seed, self.target = source, seq_len, seed, target
        self.given = given or str(source.path)
        self.targets: tuple[str, ...] = (target,)
        self._each = source.manifest.samples_per_item
        self.values: tuple[str, ...] = (PAIR,) if self._each == 2 else ()
        self._numbers: dict[str, NDArray[np.float32]] = {}
        kept = source.lengths().reshape(-1, self._each)
        self.shortened = self._fitted(kept, max_length)
        self._kept, self.max_length = kept, max_length
        self._tiles = self._tiles_kept(kept)
        self._items = np.flatnonzero(kept[:, 0])
        if not len(self._items):
            raise UserError(f"{self.given}: none of its samples fits into a row of train.seq_len={seq_len}")
        self.packing = self._packing(kept[self._items], together)
        self.n_rows, self.fill = self.packing.n_rows, self.packing.fill
        how = [PACKING_VERSION, source.fingerprint, together, max_length if self.shortened else "error", target]
        self.fingerprint = digest_of(how)

    def with_numbers(self, name: str, of_samples: NDArray[np.float32]) -> None:
        """Give rows the values `name`: the number of each sample of the source, (samples,), at its first target, 0
        elsewhere. The fingerprint stays, as nothing of the order changes.
        """
        if of_samples.shape != (self.source.n_samples,):
            raise ValueError(f"{of_samples.shape} numbers for {self.source.n_samples} samples")
        self._numbers[name] = of_samples
        self.values = (*(value for value in self.values if value != name), name)

    def items(self, k: int, epoch: int) -> NDArray[np.int64]:
        """The items of row k, in order; sample i of item j is sample j x samples an item + i of the source."""
        return self._items[self.packing.items(k, self.seed, epoch)]

    def times(self, passes: int, again: NDArray[np.bool_]) -> NDArray[np.int64]:
        """(items,) how often each item of the source has been read in so many whole passes, and in the rows of the next
        one where `again` is true; 0 of what was left out.
        """
        found = np.zeros(self.source.n_items, dtype=np.int64)
        found[self._items] = passes + again[self.packing.row_of_items(self.seed, passes)]
        return found

    def samples_in_rows(self) -> NDArray[np.int64]:
        """Numbers of the samples that rows hold: all of the source but those left out."""
        return (self._items[:, None] * self._each + np.arange(self._each)).reshape(-1)

    def read(self, k: int, epoch: int) -> Row:
        tokens, labels, weights, starts, images = [], [], [], [], []
        values: dict[str, list[NDArray]] = {name: [] for name in self.values}
        at = 0
        for p, item in enumerate(self.items(k, epoch).tolist(), 1):
            for i in range(self._each):
                number = item * self._each + i
                sample, n = self.source.sample(number), int(self._kept[item, i])
                of_label = sample.weights[1:n] if n > 1 else np.zeros(1, np.float32)
                label = np.where(of_label > 0, sample.tokens[1:n] if n > 1 else IGNORE, IGNORE)
                tokens.append(sample.tokens[: len(label)])
                labels.append(label)
                weights.append(of_label)
                starts.append(at)
                at += len(label)
                if sample.images is not None and (n_tiles := int(self._tiles[item, i])):
                    images.append(sample.images[:n_tiles])
                for name, parts in values.items():
                    part = np.full(len(label), (p, -p)[i] if name == PAIR else 0, np.float32)
                    if name in self._numbers and of_label.any():
                        part[np.flatnonzero(of_label)[0]] = self._numbers[name][number]
                    parts.append(part)
        weight = np.concatenate(weights)
        plain = bool(((weight == 0) | (weight == 1)).all())
        return Row(
            np.concatenate(tokens),
            {self.target: RowTargets(np.concatenate(labels), None if plain else weight)},
            np.array(starts, dtype=np.int64),
            {name: np.concatenate(parts) for name, parts in values.items()},
            np.concatenate(images) if images else None,
        )

    def tiles(self, k: int, epoch: int) -> int:
        """Tiles of the images in row k, without reading them."""
        return int(self._tiles[self.items(k, epoch)].sum())

    def origin(self, k: int, epoch: int, position: int) -> TokenOrigin:
        at = 0
        for item in self.items(k, epoch).tolist():
            for i in range(self._each):
                number = item * self._each + i
                length = int(self._positions(self._kept[item : item + 1, i : i + 1])[0])
                if position < at + length:
                    n_tokens = len(self.source.sample(number).tokens)
                    return TokenOrigin(self.source.origin(number), number, position - at, n_tokens)
                at += length
        raise IndexError(f"position {position} of a row with {at}")

    def described(self) -> str:
        return f"({self.given}) has {self.source.n_samples} samples"

    def notes(self) -> list[str]:
        """Lines about how the samples lie in rows, and which do not lie there whole."""
        what = "pairs" if self._each == 2 else "samples"
        lines = [f"{self.given}: {len(self._items):,} {what} in {self.n_rows:,} rows of {self._used()}"]
        dropped = [entry for entry in self.shortened if not entry.kept]
        cut = [entry for entry in self.shortened if entry.kept]
        bare = sum(self._is_bare(entry) for entry in cut)
        at_turn = self.cut_where + (f", {bare:,} of them with no target left" if bare else "")
        for done, entries in (("left out", dropped), (at_turn, cut)):
            if entries:
                lines.append(
                    f"{self.given}: {len(entries):,} {what} {done}, longer than a row of {self._row_size()}: "
                    f"{self._listed(entries)}"
                )
        return lines

    def listed(self) -> Iterator[dict[str, object]]:
        """What was cut or left out, each as its file, row, tokens and those of them that are kept."""
        for entry in self.shortened:
            origin = self.source.origin(entry.item * self._each)
            yield {"file": origin.file, "row": origin.row, "tokens": entry.tokens, "kept": entry.kept}

    def _packing(self, kept: NDArray[np.int64], together: bool) -> Packing:
        """Which row holds which of the items, whose samples have so many tokens, (items, samples an item)."""
        return Packing(self._positions(kept), self.seq_len, together)

    def _row_size(self) -> str:
        return f"train.seq_len={self.seq_len}"

    def _used(self) -> str:
        return f"{self.seq_len:,} positions, {self.fill:.2%} of them used"

    def _fitted(self, kept: NDArray[np.int64], max_length: MaxLength) -> list[Shortened]:
        """Change `kept` (items, samples an item), tokens of each sample, to what fits into a row, 0 for what is left
        out.
        """
        long = np.flatnonzero(self._positions(kept) > self.seq_len).tolist()
        found = []
        for item in long:
            tokens, most = int(kept[item].max()), 0
            if max_length == "cut" and self._each == 1:
                most = self._most_of(item)
            kept[item] = most
            found.append(Shortened(item, tokens, most))
        if found and max_length == "error":
            raise UserError(
                f"{self.given}: {len(found):,} of {len(kept):,} samples are longer than {self.most} = "
                f"{self.seq_len + self.extra} tokens: {self._listed(found)}; raise train.seq_len, or set "
                f"{self.max_length_key} to drop or cut"
            )
        return found

    def _most_of(self, item: int) -> int:
        """How many tokens of a sample that is too long a cut keeps; 0 for none."""
        ends = self.source.sample(item).turn_ends
        return int(ends[ends <= self.seq_len + 1].max(initial=0))

    def _is_bare(self, cut: Shortened) -> bool:
        """Whether what is left of a sample has no target."""
        return not self.source.sample(cut.item).weights[1 : cut.kept].any()

    def _tiles_kept(self, kept: NDArray[np.int64]) -> NDArray[np.int64]:
        """(items, samples an item) tiles of what is kept of each sample; a cut lies between turns, never in an image.
        """
        tiles = self.source.tiles().reshape(kept.shape)
        images = self.source.manifest.images
        if images is not None:
            for entry in self.shortened:
                tokens = self.source.sample(entry.item).tokens[: entry.kept]
                slots = int(np.count_nonzero(tokens == images.patch_token_id))
                tiles[entry.item] = slots // images.tokens_per_tile
        return tiles

    def _listed(self, entries: list[Shortened]) -> str:
        parts = []
        for entry in entries[:NAMED]:
            origin = self.source.origin(entry.item * self._each)
            parts.append(f"{origin.file}, row {origin.row} ({self._size(entry)})")
        more = f" and {len(entries) - NAMED:,} more" if len(entries) > NAMED else ""
        return f"{'; '.join(parts)}{more}"

    def _size(self, entry: Shortened) -> str:
        kept = f", {entry.kept:,} kept" if entry.kept else ""
        return f"{entry.tokens:,} tokens{kept}"

    @staticmethod
    def _positions(tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """(items,) positions of items with samples of so many tokens, (items, samples an item)."""
        return np.maximum(tokens - 1, 1).sum(1)
