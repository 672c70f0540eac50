"""What a row of training data is, whatever it was made of, and what a source of rows can do.

Shapes: T positions of a row, n of them in use.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

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


class RowSource(Protocol):
    """Rows of one kind from one place, in an order of their own; which are read when is the mixture's to say."""

    fingerprint: str
    """Hex digest of everything that decides the content of every row."""
    n_rows: int
    """In every epoch."""

    def read(self, k: int, epoch: int) -> Row:
        """Row k of 0..n_rows-1 in a pass over the source, from 0. UserError naming the file that is damaged."""

    def origin(self, k: int, epoch: int, position: int) -> str:
        """Where the token at a position of a row came from: file and row, for messages and replays."""
