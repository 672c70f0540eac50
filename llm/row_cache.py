"""Keys and values of rows that come and go while they decode together, each with the same bits as if it were alone.

What a row computes must not follow its neighbours, so all that decides an order of sums is its own. The key of position
p lies in slot p. A prompt is padded behind its end to a length that follows from its own; a token attends to a number
of slots that follows from its position, those beyond it being hidden; rows with the same number of slots go through the
kernel together, which works through each row by itself. llm/cache.py keeps keys one after the other instead, which is
less memory under windows and chunks, for rows that begin together.

Shapes: B rows, T tokens, S slots, H query heads, K kv heads, G query heads a kv head, d head width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm.args import AttentionSpec, Mask, ModelArgs
from llm.args.layers import attention_specs
from llm.cache import visible
from llm.kernels.attention import attend_few
from llm.layers.across import AttendAcross
from llm.layers.context import State
from llm.layers.masks import AttentionMasks, scores_of

Ints = NDArray[np.int64]
LEAST_SLOTS = 32
"""Keys of short rows are rounded up to a multiple of this, and those of long ones so that an octave has
STEPS_PER_OCTAVE lengths: few, as each costs a call, and near, as what is beyond a row's end is computed in vain."""
STEPS_PER_OCTAVE = 4
MOST_LEFT = 8
"""From one row to the next in one call, counted in places: to compute the rows that have left between them in vain
takes less time than one more call."""


def rounded(lengths: Ints, least: int = LEAST_SLOTS) -> Ints:
    """Slots for so many keys (at least 1), or the width of a prompt: a function of their number alone."""
    step = _step(lengths, least)
    return -(-lengths // step) * step


def _step(lengths: Ints, least: int = LEAST_SLOTS) -> Ints:
    """Of the numbers that these are rounded to."""
    octave = np.ceil(np.log2(lengths)).astype(np.int64)
    return np.maximum(least, 2**octave // (2 * STEPS_PER_OCTAVE))


class RowCache:
    """Memory of rows. A forward whose positions begin at 0 takes in new rows, after those there; any other has one
    token of each row there, and after these what it likes of padding (negative positions).

    A row stays in its place of the buffers until they are full, so that rows leave and join without copying others.
    Rows should join in falling order of their lengths: then those with the same number of slots lie side by side.
    """

    def __init__(self, args: ModelArgs) -> None:
        self._specs = attention_specs(args.layer_specs())
        if len(self._specs) < args.n_layers:
            raise ValueError("a layer without attention keeps a state of its own, which rows cannot join")
        if args.encoder_layers:
            raise ValueError("an encoder-decoder's rows have sources of their own, which others cannot join")
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}
        self._shape = (0, 0)  # places and slots of each buffer
        self._expected = 0
        self._copies: Ints | None = None
        self._places: Ints = np.zeros(0, dtype=np.int64)  # of each row, rising
        self._positions: Ints = np.zeros(0, dtype=np.int64)  # of each row's newest key

    @property
    def nbytes(self) -> int:
        """Bytes held by keys and values."""
        return sum(buffer.nbytes for pair in self._buffers.values() for buffer in pair)

    def first_positions(self, n_rows: int) -> Ints:
        """(B,) where rows would continue by default: their positions are always said."""
        return np.zeros(n_rows, dtype=np.int64)

    def state(self, layer: int, make: Callable[[], State]) -> State:
        """None has one: the constructor refuses such models."""
        raise ValueError(f"layer {layer} keeps a state, which rows that come and go cannot have")

    def across(
        self, positions_BT: Ints, document_starts: Ints, source: tuple[Ints, Ints] | None, device: torch.device
    ) -> AttendAcross:
        """There are no sources: the constructor refuses such models."""
        raise ValueError("an encoder-decoder's rows have sources of their own, which others cannot join")

    def expect(self, tokens: int) -> None:
        """Rows may have so many in the end: buffers that are made anew have room for them."""
        self._expected = tokens

    def take_in(self, copies: Sequence[int]) -> None:
        """How many rows each of the prompts of the next forward begins."""
        self._copies = np.repeat(np.arange(len(copies)), copies)

    def extend(self, positions_BT: Ints, document_starts: Ints, device: torch.device) -> "_Joining | _Going":
        """Make room for new rows, or for one token more of each."""
        if positions_BT[0, 0] == 0:
            rows = np.arange(len(positions_BT)) if self._copies is None else self._copies
            first = self._free_place(len(rows), positions_BT.shape[1])
            self._places = np.concatenate([self._places, np.arange(first, first + len(rows))])
            self._positions = np.concatenate([self._positions, positions_BT[rows, -1]])
            masks = AttentionMasks(self._specs, positions_BT, document_starts, device)
            self._copies = None
            return _Joining(self, slice(first, first + len(rows)), torch.from_numpy(rows).to(device), masks)
        there = len(self._places)
        if positions_BT.shape[1] != 1 or (positions_BT[:there] < 0).any() or (positions_BT[there:] >= 0).any():
            raise ValueError(f"{there} rows go on by one token each, before any padding")
        self._positions = positions_BT[:there, 0].copy()
        if (needed := self._needed_slots()) > self._shape[1]:
            self._lay_out(self._shape[0], max(needed, self._shape[1] * 3 // 2))
        return _Going(self, self._places, self._positions, device)

    def forget(self) -> None:
        """Nothing is forgotten but whole rows."""

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, in their order."""
        self._places, self._positions = self._places[list(rows)], self._positions[list(rows)]

    def _needed_slots(self) -> int:
        return int(rounded(self._positions + 1).max(initial=0))

    def _free_place(self, new: int, length: int) -> int:
        """The first of so many free places side by side, with slots for so many keys."""
        places, slots = self._shape
        there = len(self._places)
        first = int(self._places.max(initial=-1)) + 1
        if first + new <= places and length <= slots:
            return first
        if 4 * (there + new) > 3 * places or length > slots:  # so that many can join before rows are copied again
            places = max(places, 2 * (there + new))
            slots = max(self._needed_slots(), length, int(rounded(np.array(max(self._expected, 1)))))
        self._lay_out(places, slots)
        return there

    def _lay_out(self, places: int, slots: int) -> None:
        """Rows side by side from the first place on, in buffers of this shape."""
        there, index = len(self._places), torch.from_numpy(self._places)
        used = min(self._needed_slots(), slots, self._shape[1])
        for layer, pair in self._buffers.items():
            rows = index.to(pair[0].device)
            kept = [buffer[rows, :, :used] for buffer in pair]
            if (places, slots) != self._shape:
                pair = self._empty(pair[0], places, slots), self._empty(pair[0], places, slots)
                self._buffers[layer] = pair
            for buffer, old in zip(pair, kept, strict=True):
                buffer[:there, :, :used] = old
        self._shape, self._places = (places, slots), np.arange(there)

    @staticmethod
    def _empty(like_PKSd: Tensor, places: int, slots: int) -> Tensor:
        """Of zeros, as what a mask hides must be finite all the same."""
        shape = places, like_PKSd.shape[1], slots, like_PKSd.shape[3]
        if like_PKSd.device.type == "cpu" and like_PKSd.dtype == torch.float32:
            return torch.from_numpy(np.zeros(shape, dtype=np.float32))  # takes memory only where it is written
        return like_PKSd.new_zeros(shape)

    def buffers(self, layer: int, k_BTKd: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, (places, K, slots, d). Half precision is kept as float32 on a CPU, where its
        kernels take two to five times as long for one query (measured)."""
        if layer not in self._buffers:
            wide = k_BTKd.device.type == "cpu" and k_BTKd.dtype.itemsize == 2
            like = k_BTKd[:, :0].transpose(1, 2).to(torch.float32 if wide else k_BTKd.dtype)
            self._buffers[layer] = self._empty(like, *self._shape), self._empty(like, *self._shape)
        return self._buffers[layer]


class _Joining:
    """Attention of whole prompts, whose keys and values are kept. rows: which of the prompts each place gets."""

    def __init__(self, cache: RowCache, places: slice, rows: Tensor, masks: AttentionMasks) -> None:
        self._cache, self._places, self._rows, self._masks = cache, places, rows, masks

    def __call__(
        self, layer: int, spec: AttentionSpec, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor
    ) -> Tensor:
        for buffer, new in zip(self._cache.buffers(layer, k_BTKd), (k_BTKd, v_BTKd), strict=True):
            buffer[self._places, :, : k_BTKd.shape[1]] = new[self._rows].transpose(1, 2)
        return self._masks(layer, spec, q_BTHd, k_BTKd, v_BTKd)


@dataclass(frozen=True)
class _Run:
    """Rows that attend to the same slots, and the places from the first one's to the last one's."""

    rows: slice
    places: slice
    slots: slice
    hidden_B11S: Tensor
    """of each place"""
    row_of_place: Tensor | None
    """Where rows have left: another row stands for each of those, and what comes of it is dropped"""
    place_of_row: Tensor | None
    """among the places"""


class _Going:
    """Attention of one token of each row to its own key and all earlier ones."""

    def __init__(self, cache: RowCache, places_B: Ints, positions_B: Ints, device: torch.device) -> None:
        self._cache, self._places, self._positions, self._device = cache, places_B, positions_B, device
        self._new: tuple[tuple[int, ...], Tensor] | None = None
        self._runs: dict[tuple[Mask, int | None], list[_Run]] = {}

    def __call__(
        self, layer: int, spec: AttentionSpec, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor
    ) -> Tensor:
        there, (keys, values) = len(self._places), self._cache.buffers(layer, k_BTKd)
        written = self._written(keys)
        for buffer, new in zip((keys, values), (k_BTKd, v_BTKd), strict=True):
            buffer.view(-1, buffer.shape[-1]).index_copy_(0, written, new[:there, 0].flatten(0, 1).to(buffer.dtype))
        # the query heads of a kv head as if they were so many queries: no key is copied for each of them
        q_BKGd = q_BTHd[:there, 0].to(keys.dtype).unflatten(1, (k_BTKd.shape[2], -1))
        scores, out = scores_of(spec), torch.zeros_like(q_BTHd)
        for run in self._runs_of(spec):
            k, v = (buffer[run.places, :, run.slots] for buffer in (keys, values))
            q = q_BKGd[run.rows] if run.row_of_place is None else q_BKGd.index_select(0, run.row_of_place)
            found = attend_few(q, k, v, run.hidden_B11S, scores)
            if run.place_of_row is not None:
                found = found.index_select(0, run.place_of_row)
            out[run.rows, 0] = found.flatten(1, 2).to(out.dtype)
        return out

    def _written(self, keys_PKSd: Tensor) -> Tensor:
        """Where the new keys lie among all, (B K,)."""
        shape = tuple(keys_PKSd.shape)
        if self._new is None or self._new[0] != shape:
            _, n_heads, n_slots, _ = shape
            heads_BK = self._places[:, None] * n_heads + np.arange(n_heads)
            slots = torch.from_numpy((heads_BK * n_slots + self._positions[:, None]).reshape(-1))
            self._new = shape, slots.to(self._device)
        return self._new[1]

    def _runs_of(self, spec: AttentionSpec) -> list[_Run]:
        kind = spec.mask, spec.span
        if kind not in self._runs:
            slots_B = rounded(self._positions + 1)
            cuts = np.flatnonzero((np.diff(slots_B) != 0) | (np.diff(self._places) > MOST_LEFT)) + 1
            bounds = [0, *cuts.tolist(), len(slots_B)]
            self._runs[kind] = [
                self._run(slice(low, high), int(slots_B[low]), *kind)
                for low, high in zip(bounds[:-1], bounds[1:], strict=True)
            ]
        return self._runs[kind]

    def _run(self, rows: slice, n_slots: int, mask: Mask, span: int | None) -> _Run:
        first = 0
        if span is not None:  # before what the shortest row with so many slots sees
            position = n_slots - int(_step(np.array(n_slots)))
            first = position // span * span if mask == "chunk" else max(0, position - span + 1)
        own = self._places[rows]
        places, slots = slice(int(own[0]), int(own[-1]) + 1), slice(first, n_slots)
        # each place's own row, or where that has left the one before
        row_of_place = rows.start + np.searchsorted(own, np.arange(places.start, places.stop), side="right") - 1
        seen = visible(self._positions[row_of_place, None], np.arange(first, n_slots)[None], mask, span)
        hidden_B11S = torch.from_numpy(~seen[:, None]).to(self._device)
        if len(row_of_place) == len(own):
            return _Run(rows, places, slots, hidden_B11S, None, None)
        ways = (torch.from_numpy(numbers).to(self._device) for numbers in (row_of_place, own - places.start))
        return _Run(rows, places, slots, hidden_B11S, *ways)
