"""Which items share a row: best fit decreasing, planned ahead, and dealt anew in every epoch.

The plan is made of lengths alone: each item, the longest first, goes into the fullest row that still holds it. It is
the same for every seed and epoch, and so is the number of rows. What changes with (seed, epoch) is which item takes
which place: items of one length trade places at random, and then pairs of places trade items as long as no row grows
beyond T. Nothing depends on ranks or batches, so a plan can be made again anywhere.

Shapes: n items, R rows, T positions of a row. A slot is a place for an item in a row; slots are sorted by the length
that they were made for, the longest first.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llm.data.order import permute, round_keys

PACKING_VERSION = 1
"""Raise it when the same lengths, seed and epoch would give other rows."""
ROUNDS = 16
"""Rounds of trades in each epoch."""

Ints = NDArray[np.int64]


class Packing:
    """The rows of items of given lengths.

    n_rows: R, in every epoch. fill: share of the positions of all rows that items take.
    """

    def __init__(self, lengths: Ints, seq_len: int, together: bool = True) -> None:
        """lengths: (n,) positions of each item, each from 1 to seq_len (ValueError otherwise). together: False gives
        each item a row of its own.
        """
        if len(lengths) == 0 or int(lengths.min()) < 1 or int(lengths.max()) > seq_len:
            raise ValueError(f"lengths must be from 1 to {seq_len}")
        self.lengths, self.seq_len = lengths, seq_len
        by_length = np.argsort(-lengths, kind="stable")
        self._plan(by_length, _best_fit(lengths[by_length], seq_len) if together else None)
        self.fill = int(lengths.sum()) / (self.n_rows * seq_len)

    def _plan(self, by_length: Ints, row_of_slot: Ints | None) -> None:
        """by_length: (n,) the items, the longest first; row_of_slot: None for a row each."""
        self._by_length = by_length
        self._row_of_slot = by_length if row_of_slot is None else row_of_slot
        self.n_rows = int(self._row_of_slot.max()) + 1
        self._together = row_of_slot is not None and self.n_rows > 1
        self._slots_by_row = np.argsort(self._row_of_slot, kind="stable")
        self._ends = np.cumsum(np.bincount(self._row_of_slot, minlength=self.n_rows))
        self._last: list[tuple[tuple[int, int], Ints]] = []

    def items(self, row: int, seed: int, epoch: int) -> Ints:
        """The items of a row in an epoch, ascending; IndexError where there is no such row."""
        if not 0 <= row < self.n_rows:
            raise IndexError(f"row {row} of {self.n_rows}")
        first = int(self._ends[row - 1]) if row else 0
        return np.sort(self._dealt(seed, epoch)[first : int(self._ends[row])])

    def row_of_items(self, seed: int, epoch: int) -> Ints:
        """(n,) the row of each item in an epoch."""
        rows = np.empty(len(self.lengths), dtype=np.int64)
        rows[self._dealt(seed, epoch)] = self._row_of_slot[self._slots_by_row]
        return rows

    def _dealt(self, seed: int, epoch: int) -> Ints:
        """(n,) all items, row by row. Two epochs are kept: where one ends, rows of the next are asked for too."""
        for key, items in self._last:
            if key == (seed, epoch):
                return items
        dealt = self._deal(seed, epoch)[self._slots_by_row] if self._together else self._by_length[self._slots_by_row]
        self._last = [*self._last[-1:], ((seed, epoch), dealt)]
        return dealt

    def _deal(self, seed: int, epoch: int) -> Ints:
        """(n,) the item in each slot."""
        n, rows = len(self.lengths), self._row_of_slot
        drawn = permute(np.arange(n), n, round_keys(seed, "pack", epoch))
        items = self._in_slots(drawn)
        sides = [
            Side(lengths[items], seq_len - np.bincount(rows, lengths[items], self.n_rows).astype(np.int64))
            for lengths, seq_len in self._sides()
        ]
        for number in range(ROUNDS):
            keys = round_keys(seed, "pack", epoch, number)
            distance = 1 + int(keys[0] % np.uint64(min(n - 1, 1 << number)))
            first = np.arange(int(keys[1] % np.uint64(distance + 1)), n - distance)
            first = first[(first - first[0]) // distance % 2 == 0] if len(first) else first
            _trade(items, sides, rows, first, first + distance, drawn[first] % 8 != number % 8)
        return items

    def _in_slots(self, drawn: Ints) -> Ints:
        """(n,) items in the order of the slots that were made for them, those of one length as drawn."""
        return np.lexsort((drawn, -self.lengths))

    def _sides(self) -> Sequence[tuple[Ints, int]]:
        """Positions of each item, and of a row, on each side on which it takes some."""
        return [(self.lengths, self.seq_len)]


class Side(NamedTuple):
    """What slots and rows have of positions on one side."""

    size: Ints
    """(n,) of the item in each slot."""
    room: Ints
    """(R,) that are free in each row."""


def _trade(
    items: Ints, sides: Sequence[Side], rows: Ints, one: Ints, other: Ints, wanted: NDArray[np.bool_]
) -> None:
    """Let slots trade their items, each with one other at most, where all that a row gains fits into its room on every
    side.
    """
    one, other = one[wanted], other[wanted]
    fits = np.ones(len(one), dtype=bool)
    for size, room in sides:
        gain = size[one] - size[other]  # of the other's row
        grows = np.where(gain > 0, rows[other], rows[one])
        asked = np.bincount(grows, np.abs(gain), len(room)).astype(np.int64)
        fits &= asked[grows] <= room[grows]
    one, other = one[fits], other[fits]
    items[one], items[other] = items[other], items[one]
    for size, room in sides:
        gain = size[one] - size[other]
        size[one], size[other] = size[other], size[one]
        np.add.at(room, rows[one], gain)
        np.subtract.at(room, rows[other], gain)


def _best_fit(lengths: Ints, seq_len: int) -> Ints:
    """(n,) the row of each item; lengths descend. Items of one length and rows of one room are placed at once."""
    rows = np.empty(len(lengths), dtype=np.int64)
    sizes, firsts = np.unique(-lengths, return_index=True)
    ends = np.append(firsts[1:], len(lengths))
    rooms: list[int] = []  # ascending
    with_room: dict[int, list[Ints]] = {}
    n_rows = 0

    def put(room: int, some: Ints) -> None:
        if room and len(some):
            if room not in with_room:
                insort(rooms, room)
                with_room[room] = []
            with_room[room].append(some)

    for length, done, end in zip((-sizes).tolist(), firsts.tolist(), ends.tolist(), strict=True):
        while done < end:
            at = bisect_left(rooms, length)
            room = rooms.pop(at) if at < len(rooms) else seq_len  # a row with all of its room is a new one
            each = room // length
            wanted = -((done - end) // each)
            if room == seq_len:
                used = np.arange(n_rows, n_rows + wanted)
                n_rows += wanted
            else:
                some = np.concatenate(with_room.pop(room))
                used = some[:wanted]
                put(room, some[wanted:])
            placed = min(end - done, len(used) * each)
            rows[done : done + placed] = np.repeat(used, each)[:placed]
            whole, rest = divmod(placed, each)
            put(room - each * length, used[:whole])
            put(room - rest * length, used[whole:])
            done += placed
    return rows
