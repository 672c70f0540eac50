"""A batch cut into segments, in the forms in which attention kernels take it.

Shapes: N tokens of the flattened batch, S segments, P padded slots.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]
PADDED_LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128)


class Bucket(NamedTuple):
    """Segments of one padded length."""

    length: int
    start: int | None
    """The token from which on they lie one after the other, without padding; None where they do not."""
    token_of_slot: Tensor
    """As of Slots, of these alone."""
    tokens: Tensor
    slots: Tensor
    """Their tokens, and the real slot of each among theirs."""


@dataclass(frozen=True)
class Slots:
    """Segments ordered by padded length, each padded at its end: the layout that unequal segments are attended in."""

    token_of_slot: Tensor
    """(P,) flat token index; padding repeats its segment's last token, and no real query sees it there: it lies ahead,
    and `keys_seen` hides it from queries that see both ways."""
    slot_of_token: Tensor
    """(N,) the real slot of each token."""
    lengths: list[int]
    """Padded length of each bucket."""
    sizes: list[int]
    """Slots of each bucket."""
    filled: list[Ints]
    """Tokens of each segment of each bucket."""

    @cached_property
    def keys_seen(self) -> list[Tensor | None]:
        """Of each bucket, which slots of its segments are no padding, (segments, length) bool; None where all are."""
        return [
            None
            if (filled == length).all()
            else torch.from_numpy(np.arange(length) < filled[:, None]).to(self.token_of_slot.device)
            for length, filled in zip(self.lengths, self.filled, strict=True)
        ]

    @cached_property
    def buckets(self) -> list[Bucket]:
        """The same, bucket by bucket."""
        found = []
        first = 0
        for length, size in zip(self.lengths, self.sizes, strict=True):
            token_of_slot = self.token_of_slot[first : first + size]
            place = self.slot_of_token - first
            tokens = ((place >= 0) & (place < size)).nonzero().flatten()
            steps = token_of_slot[1:] - token_of_slot[:-1]
            start = int(token_of_slot[0]) if len(tokens) == size and bool((steps == 1).all()) else None
            found.append(Bucket(length, start, token_of_slot, tokens, place[tokens]))
            first += size
        return found


class Segments:
    """A cut of the flattened batch into segments."""

    def __init__(self, bounds: Ints, device: torch.device) -> None:
        """bounds: (S + 1,) flat indices from 0 to N."""
        self._bounds = bounds
        self._device = device
        self._lengths = np.diff(bounds)
        self.max_length = int(self._lengths.max())

    @property
    def common_length(self) -> int | None:
        """The length of every segment, or None if they differ."""
        return self.max_length if (self._lengths == self.max_length).all() else None

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """(S + 1,) int32 bounds on the device."""
        return torch.from_numpy(self._bounds.astype(np.int32)).to(self._device)

    @cached_property
    def slots(self) -> Slots:
        """The padded layout. A padded length depends on its segment's own length only, so no document's result depends
        on another's."""
        padded = padded_lengths(self._lengths)
        order = np.argsort(padded, kind="stable")
        width = padded[order]
        slot_of_segment = np.cumsum(width) - width
        within = np.arange(width.sum()) - np.repeat(slot_of_segment, width)
        inside = np.minimum(within, np.repeat(self._lengths[order], width) - 1)
        token_of_slot = np.repeat(self._bounds[order], width) + inside
        slot_of_token = np.empty(self._bounds[-1], dtype=np.int64)
        slot_of_token[token_of_slot[within == inside]] = np.flatnonzero(within == inside)
        lengths, n_segments = np.unique(padded, return_counts=True)
        return Slots(
            token_of_slot=torch.from_numpy(token_of_slot).to(self._device),
            slot_of_token=torch.from_numpy(slot_of_token).to(self._device),
            lengths=lengths.tolist(),
            sizes=(lengths * n_segments).tolist(),
            filled=np.split(self._lengths[order], np.cumsum(n_segments)[:-1]),
        )


def padded_lengths(lengths: Ints) -> Ints:
    """Short segments are rounded up to one of a few lengths; long ones keep theirs, as a call each costs little beside
    their work."""
    steps = np.array(PADDED_LENGTHS)
    rounded = steps[np.minimum(np.searchsorted(steps, lengths), len(steps) - 1)]
    return np.maximum(lengths, rounded)
