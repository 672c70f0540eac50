"""Where a foreign checkpoint keeps what ours keeps: a list of pairs, each a box of a foreign tensor that equals a box
of one of our parameters.

Everything that happens to weights between two families is one of a few shapes of such lists (`TRANSFORMS`): a rename, a
transposition, parts of a fused matrix, experts apart or stacked. So import, export, load hooks and reading only a
rank's part all work from the same list.

Shapes: D model width, F hidden width, E experts, H query heads, d head width.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from llm.boxes import Box, box_shape, whole

Shape = tuple[int, ...]
Transform = Literal["same", "turned", "rows", "heads", "columns", "turned_rows", "flat_experts", "behind_two"]


@dataclass(frozen=True)
class BoxPair:
    """Equal elements of a foreign tensor and of one of our parameters."""

    key: str
    """Name of the foreign tensor."""
    shard: int
    """In which of the files it lies, where each has a part of the same name."""
    theirs: Box
    name: str
    """Canonical name of ours."""
    mine: Box
    """Has one dimension more than `theirs` where that is the matrix of one expert."""
    turned: bool = False
    """Whether the last two dimensions are exchanged."""
    twin: bool = False
    """Whether another pair holds the same elements of ours: they must be equal."""

    def within(self, box: Box) -> "BoxPair | None":
        """The part of it that lies in `box` of our parameter; None where they do not meet."""
        common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(self.mine, box, strict=True))
        if any(a >= b for a, b in common):
            return None
        if common == self.mine:
            return self
        lead = len(self.mine) - len(self.theirs)
        moved = [(a - start, b - start) for (a, b), (start, _) in zip(common[lead:], self.mine[lead:], strict=True)]
        if self.turned:
            moved[-2:] = moved[:-3:-1]
        theirs = tuple((start + a, start + b) for (a, b), (start, _) in zip(moved, self.theirs, strict=True))
        return BoxPair(self.key, self.shard, theirs, self.name, common, self.turned, self.twin)

    def to_mine(self, x: Tensor) -> Tensor:
        """Values of `theirs` in the shape of `mine`."""
        return (x.transpose(-1, -2) if self.turned else x).reshape(box_shape(self.mine))

    def to_theirs(self, x: Tensor) -> Tensor:
        """Values of `mine` in the shape of `theirs`."""
        matrix = x.reshape(box_shape(self.mine)[len(self.mine) - len(self.theirs) :])
        return matrix.transpose(-1, -2) if self.turned else matrix


@dataclass(frozen=True)
class FilePart:
    """What one file has of one of our parameters: a box, or all of it."""

    name: str
    box: Box
    twin: bool = False


Cut = Callable[[Sequence[str], Sequence[FilePart], int, int], Iterator[BoxPair]]
"""(keys, parts, head width, shard) -> pairs."""


def _same(keys: Sequence[str], parts: Sequence[FilePart], _: int, shard: int) -> Iterator[BoxPair]:
    """A rename."""
    (key,), (part,) = keys, parts
    yield BoxPair(key, shard, whole(box_shape(part.box)), part.name, part.box, twin=part.twin)


def _behind_two(keys: Sequence[str], parts: Sequence[FilePart], _: int, shard: int) -> Iterator[BoxPair]:
    """Ours behind two rows that are never read: a table of positions that begin at 2."""
    (key,), (part,) = keys, parts
    n, *rest = box_shape(part.box)
    yield BoxPair(key, shard, ((2, 2 + n), *whole(tuple(rest))), part.name, part.box, twin=part.twin)


def _turned(keys: Sequence[str], parts: Sequence[FilePart], _: int, shard: int) -> Iterator[BoxPair]:
    """Last two dimensions exchanged: of one tensor, or of one for each expert, which ours stacks."""
    (part,) = parts
    box = part.box
    if len(keys) == 1 and len(box) == 3 and box[0] != (0, 1):
        shape = box_shape(box)
        yield BoxPair(keys[0], shard, whole((shape[0], shape[2], shape[1])), part.name, box, True, part.twin)
        return
    first = box[0][0] if len(box) == 3 else 0
    for e, key in enumerate(keys):
        mine = ((first + e, first + e + 1), *box[1:]) if len(box) == 3 else box
        rows, columns = box_shape(box)[-2:]
        yield BoxPair(key, shard, whole((columns, rows)), part.name, mine, True, part.twin)


def _rows(keys: Sequence[str], parts: Sequence[FilePart], _: int, shard: int) -> Iterator[BoxPair]:
    """Ours one after the other along the first dimension: [q; k; v], [w1; w3]."""
    at = 0
    for part in parts:
        n, *rest = box_shape(part.box)
        yield BoxPair(keys[0], shard, ((at, at + n), *whole(tuple(rest))), part.name, part.box, twin=part.twin)
        at += n


def _heads(keys: Sequence[str], parts: Sequence[FilePart], head_width: int, shard: int) -> Iterator[BoxPair]:
    """For each head its rows of ours, one after the other: (H, 3, d) of GPT-NeoX."""
    n_rows, *rest = box_shape(parts[0].box)
    for head in range(n_rows // head_width):
        for i, part in enumerate(parts):
            at = (head * len(parts) + i) * head_width
            start = part.box[0][0] + head * head_width
            mine = ((start, start + head_width), *part.box[1:])
            theirs = ((at, at + head_width), *whole(tuple(rest)))
            yield BoxPair(keys[0], shard, theirs, part.name, mine, twin=part.twin)


def _columns(keys: Sequence[str], parts: Sequence[FilePart], _: int, shard: int) -> Iterator[BoxPair]:
    """Ours one after the other along the last dimension: (E, D, 2F)."""
    at = 0
    for part in parts:
        *rest, n = box_shape(part.box)
        yield BoxPair(keys[0], shard, (*whole(tuple(rest)), (at, at + n)), part.name, part.box, twin=part.twin)
        at += n


def _turned_rows(keys: Sequence[str], parts: Sequence[FilePart], _: int, shard: int) -> Iterator[BoxPair]:
    """Ours, turned, one after the other along the second dimension: (E, 2F, D)."""
    at = 0
    for part in parts:
        n_experts, width, n = box_shape(part.box)
        theirs = ((0, n_experts), (at, at + n), (0, width))
        yield BoxPair(keys[0], shard, theirs, part.name, part.box, True, part.twin)
        at += n


def _flat_experts(keys: Sequence[str], parts: Sequence[FilePart], _: int, shard: int) -> Iterator[BoxPair]:
    """(E, a, b) of ours as a matrix (E a, b)."""
    (part,) = parts
    n_experts, rows, columns = box_shape(part.box)
    for e in range(n_experts):
        start = part.box[0][0] + e
        mine = ((start, start + 1), *part.box[1:])
        yield BoxPair(keys[0], shard, ((e * rows, (e + 1) * rows), (0, columns)), part.name, mine, twin=part.twin)


TRANSFORMS: dict[Transform, Cut] = {
    "same": _same,
    "turned": _turned,
    "rows": _rows,
    "heads": _heads,
    "columns": _columns,
    "turned_rows": _turned_rows,
    "flat_experts": _flat_experts,
    "behind_two": _behind_two,
}


def foreign_shapes(pairs: Sequence[BoxPair]) -> dict[tuple[int, str], Shape]:
    """Shape of each foreign tensor, by (shard, key), that the pairs make up."""
    found: dict[tuple[int, str], Shape] = {}
    for pair in pairs:
        ends = tuple(stop for _, stop in pair.theirs)
        known = found.get((pair.shard, pair.key), ends)
        found[pair.shard, pair.key] = tuple(max(a, b) for a, b in zip(known, ends, strict=True))
    return found
