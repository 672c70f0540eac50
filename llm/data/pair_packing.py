"""Which pairs share a row, both of whose sides must hold them: best fit decreasing, as of items with one length.

Pairs go in by the larger share of a row that they take on either side, the largest first, each into the row that has
least room left with it. A row's room is two numbers; what is left of it is measured by the sum of their shares.

Shapes: n pairs, T and S positions of a row for targets and sources.
"""

from collections.abc import Sequence

import numpy as np

from llm.data.packing import Ints, Packing


class PairPacking(Packing):
    """The rows of pairs of given lengths.

    fill, source_fill: shares of the positions of all rows, for targets and for sources, that pairs take.
    """

    def __init__(
        self, lengths: Ints, source_lengths: Ints, seq_len: int, source_len: int, together: bool = True
    ) -> None:
        """lengths, source_lengths: (n,) positions of each pair, from 1 to seq_len and to source_len (ValueError
        otherwise). together: False gives each pair a row of its own.
        """
        for of_side, most in ((lengths, seq_len), (source_lengths, source_len)):
            if len(of_side) == 0 or int(of_side.min()) < 1 or int(of_side.max()) > most:
                raise ValueError(f"lengths must be from 1 to {most}")
        self.lengths, self.source_lengths, self.seq_len, self.source_len = lengths, source_lengths, seq_len, source_len
        # whole numbers, so that equal shares are equal
        self._larger = np.maximum(lengths * source_len, source_lengths * seq_len)
        by_length = np.lexsort((np.arange(len(lengths)), -source_lengths, -lengths, -self._larger))
        rows = _best_fit(lengths[by_length], source_lengths[by_length], seq_len, source_len) if together else None
        self._plan(by_length, rows)
        self.fill = int(lengths.sum()) / (self.n_rows * seq_len)
        self.source_fill = int(source_lengths.sum()) / (self.n_rows * source_len)

    def _in_slots(self, drawn: Ints) -> Ints:
        return np.lexsort((drawn, -self.source_lengths, -self.lengths, -self._larger))

    def _sides(self) -> Sequence[tuple[Ints, int]]:
        return [(self.lengths, self.seq_len), (self.source_lengths, self.source_len)]


def _best_fit(lengths: Ints, source_lengths: Ints, seq_len: int, source_len: int) -> Ints:
    """(n,) the row of each pair, in the order given. Pairs of one size and rows of one room are placed at once."""
    rows = np.empty(len(lengths), dtype=np.int64)
    rooms = _Rooms(seq_len, source_len)
    changes = np.flatnonzero((np.diff(lengths) != 0) | (np.diff(source_lengths) != 0)) + 1
    firsts, ends = np.append(0, changes), np.append(changes, len(lengths))
    n_rows = 0
    for done, end in zip(firsts.tolist(), ends.tolist(), strict=True):
        size = int(lengths[done]), int(source_lengths[done])
        while done < end:
            room, some = rooms.take(*size)
            each = min(room[0] // size[0], room[1] // size[1])
            wanted = -((done - end) // each)
            if some is None:
                used = np.arange(n_rows, n_rows + wanted)
                n_rows += wanted
            else:
                used = some[:wanted]
                rooms.put(room, some[wanted:])
            placed = min(end - done, len(used) * each)
            rows[done : done + placed] = np.repeat(used, each)[:placed]
            whole, rest = divmod(placed, each)
            for held, of_room in ((each, used[:whole]), (rest, used[whole:])):
                rooms.put((room[0] - held * size[0], room[1] - held * size[1]), of_room)
            done += placed
    return rows


class _Rooms:
    """The rows that have room on both sides, by their room."""

    def __init__(self, seq_len: int, source_len: int) -> None:
        self._whole = seq_len, source_len
        self._rows: dict[tuple[int, int], list[Ints]] = {}
        self._places: dict[tuple[int, int], int] = {}
        self._rooms = np.zeros((64, 2), dtype=np.int64)
        """The first of them are those in use, in no order."""

    def put(self, room: tuple[int, int], rows: Ints) -> None:
        """Rows that now have this room; nothing where a side has none."""
        if not len(rows) or not min(room):
            return
        if room not in self._rows:
            place = len(self._rows)
            if place == len(self._rooms):
                self._rooms = np.concatenate((self._rooms, np.zeros_like(self._rooms)))
            self._rows[room], self._places[room], self._rooms[place] = [], place, room
        self._rows[room].append(rows)

    def take(self, length: int, source_length: int) -> tuple[tuple[int, int], Ints | None]:
        """The least room that holds such a pair, with all rows that have it, which are no longer here; None of them
        where only a new row holds it. Of equal ones the room with less for targets.
        """
        seq_len, source_len = self._whole
        targets, sources = self._rooms[: len(self._rows)].T
        held = np.flatnonzero((targets >= length) & (sources >= source_length))
        if not len(held):
            return self._whole, None
        left = targets[held] * source_len + sources[held] * seq_len
        place = int(held[np.lexsort((targets[held], left))[0]])
        room = int(targets[place]), int(sources[place])
        last = len(self._rows) - 1
        moved = tuple(self._rooms[last].tolist())
        self._rooms[place], self._places[moved] = self._rooms[last], place
        del self._places[room]
        return room, np.concatenate(self._rows.pop(room))
