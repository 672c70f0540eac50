"""What a row of training data is, whatever it was made of, and what a source of rows can do.

Shapes: T positions of a row, n of them in use; m positions of its source in use; S pixels a side of a tile.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class RowTargets:
    """What is to be predicted at each position of a row."""

    labels: NDArray[np.int64]
    """(n,); negative where there is no target."""
    weights: NDArray[np.float32] | None = None
    """(n,): factor of each label's loss, which counts in the denominator too; None = 1."""


@dataclass(frozen=True)
class SourceSide:
    """What the encoder of an encoder-decoder reads of a row."""

    tokens: NDArray[np.int64]
    """(m,)"""
    starts: NDArray[np.int64]
    """Positions at which the source of each document or sample of the row begins, in their order, the first 0."""


@dataclass(frozen=True)
class Row:
    """One row: what goes into the model side by side with other rows, and is filled up to T."""

    tokens: NDArray[np.int64]
    """(n,) inputs, n from 1 to T."""
    targets: Mapping[str, RowTargets]
    """By name: what the objectives look for; text and conversations have `lm`."""
    starts: NDArray[np.int64]
    """Positions at which a document or sample begins, ascending, the first 0; none sees another."""
    values: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    """(n,) each: further numbers of each position, by name."""
    images: NDArray[np.uint8] | None = None
    """(tiles, 3, S, S), in the order of their slots among the tokens; None without images."""
    features: NDArray[np.float32] | None = None
    """(n, F): the values that are read in the place of tokens, which are 0 then; None where tokens are read."""
    causal: bool = True
    """Whether its tokens see none behind them; false = they see their document or sample both ways."""
    source: SourceSide | None = None
    """None: there is nothing for an encoder."""


@dataclass(frozen=True)
class Origin:
    """Where a document or sample was read: `file`, an absolute path where the source knows its folder; `row`, its line
    (JSONL) or row (tables) from 1, None where the file is one document.
    """

    file: str
    row: int | None

    def __str__(self) -> str:
        return self.file if self.row is None else f"{self.file}:{self.row}"


@dataclass(frozen=True)
class TokenOrigin:
    """Where a token of a row comes from."""

    origin: Origin
    document: int
    """Number of the document or sample in its source, from 0."""
    offset: int
    """Number of the token in it, from 0."""
    length: int
    """Tokens of the whole document or sample."""


class RowSource(Protocol):
    """Rows of one kind from one place, in an order of their own; which are read when is the mixture's to say."""

    fingerprint: str
    """Hex digest of everything but the length of a row and the seed that decides the content of every row."""
    n_rows: int
    """In every epoch."""
    targets: tuple[str, ...]
    """Names of the targets that every row has."""
    values: tuple[str, ...]
    """Names of the values that every row has."""

    def read(self, k: int, epoch: int) -> Row:
        """Row k of 0..n_rows-1 in a pass over the source, from 0. UserError naming the file that is damaged."""

    def origin(self, k: int, epoch: int, position: int) -> TokenOrigin:
        """Where the token at a position of a row came from, for messages and replays."""

    def described(self) -> str:
        """What it is called by its user and holds, in words, as `(chats.jsonl) has 120 samples`."""


@runtime_checkable
class WithImages(Protocol):
    """What a source of rows can do besides, where rows of it may have images."""

    def tiles(self, k: int, epoch: int) -> int:
        """Tiles of row k in a pass over the source, without reading them."""


@runtime_checkable
class OfValues(Protocol):
    """A source of rows of values."""

    features: int | None
    """Values of a position, F; None where its rows are of tokens."""


def features_in(sources: Iterable[RowSource]) -> int | None:
    """Values of a position in rows of these sources; None where they are of tokens."""
    return next((source.features for source in sources if isinstance(source, OfValues)), None)


def tiles_of(rows: RowSource, k: int, epoch: int) -> int:
    """Tiles of the images in a row of any source."""
    return rows.tiles(k, epoch) if isinstance(rows, WithImages) else 0
