"""Keys and values of earlier tokens, for decoding: an explicit object, one per generation; the model holds none.

Each key keeps its absolute position, and what a query sees is decided on absolute positions alone, so that prompts of
different lengths, several new tokens at once and chunk boundaries are all the same case. Chunked layers forget keys
below the current chunk, and those with a window what has left it. A cache grows with its rows, or slides along them:
with a window of its own every layer sees no more than so many of the newest positions, which keep counting.

An encoder-decoder's cache also keeps keys and values of what the encoder made of each row's source, which are computed
once.

Shapes: B batch, T new tokens, S remembered slots, or tokens of a source, H query heads, K kv heads, d head width.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm.args import AttentionSpec, Mask, ModelArgs
from llm.args.layers import attention_specs
from llm.kernels.attention import masked_attention
from llm.kernels.scores import Scores
from llm.layers.across import AcrossMasks, AttendAcross
from llm.layers.context import LayerState, State
from llm.layers.masks import Attend, AttentionMasks, scores_of, visible

Ints = NDArray[np.int64]
MaskKind = tuple[Mask, int | None]  # of an AttentionSpec: mask and span
QUERY_BLOCK = 256  # queries masked at a time, so that no (T, S) mask of a long continuation exists
SPARE_SLOTS = 64


class Remembered(Protocol):
    """What a model needs of whatever keeps keys, values and states of rows that it continues."""

    def first_positions(self, n_rows: int) -> Ints:
        """(B,) where rows continue by default."""

    def extend(self, positions_BT: Ints, document_starts: Ints, device: torch.device) -> Attend:
        """Make room for new tokens at these positions (negative = padding), and attend to them and to earlier ones."""

    def state(self, layer: int, make: Callable[[], State]) -> State:
        """What a layer with a state remembers (llm/layers/context.py), made when first asked for."""

    def across(
        self, positions_BT: Ints, document_starts: Ints, source: tuple[Ints, Ints] | None, device: torch.device
    ) -> AttendAcross:
        """Attention of new tokens to what the encoder made of the rows' sources, asked for before `extend`. source:
        positions and documents of the sources, with the first tokens; None with all later ones."""

    def forget(self) -> None:
        """Drop what no later token can see. Called after each forward."""


class Cache:
    """Memory of a batch of rows. Give the same object to every forward of one generation."""

    def __init__(self, args: ModelArgs, longest: int | None = None, window: int | None = None) -> None:
        """longest: tokens that a row will have in the end, padding included, where known: memory still grows as it is
        needed, but is never taken for more. window: see `window`. ValueError where the model cannot have it."""
        self._specs = attention_specs(args.layer_specs())
        self._memories = {(spec.mask, spec.span): _Memory(longest) for spec in self._specs}
        self._states: dict[int, LayerState] = {}
        self._sources: _Sources | None = None
        self.window = window
        self.length = 0
        """Tokens seen in each row, padding included."""
        self.next_position: Ints | None = None
        """(B,) position that each row's next token has, unless given; None while empty."""

    @property
    def window(self) -> int | None:
        """Newest positions that a token sees, itself among them, on layers that would see more; None = as many as there
        are. It may change between forwards; what has left a window does not come back. States of layers that keep one
        have no window. Raises ValueError, when set, where layers attend to chunks longer than it."""
        return self._window

    @window.setter
    def window(self, window: int | None) -> None:
        if window is not None and window < 1:
            raise ValueError(f"a cache's window of {window} must be at least 1")
        for mask, span in self._memories:
            if window is not None and mask == "chunk" and span is not None and window < span:
                raise ValueError(f"a cache's window of {window} is shorter than the chunks of {span} that layers see")
        self._window = window

    @property
    def nbytes(self) -> int:
        """Bytes held by keys, values and states."""
        return sum(memory.nbytes for memory in self._held)

    @property
    def _held(self) -> list[LayerState]:
        sources = [] if self._sources is None else [self._sources]
        return [*self._memories.values(), *self._states.values(), *sources]

    def state(self, layer: int, make: Callable[[], State]) -> State:
        """What a layer with a state remembers (llm/layers/context.py), made when first asked for."""
        if layer not in self._states:
            self._states[layer] = make()
        return cast(State, self._states[layer])

    def across(
        self, positions_BT: Ints, document_starts: Ints, source: tuple[Ints, Ints] | None, device: torch.device
    ) -> AttendAcross:
        """Attention to the encoder's memory, whose keys and values are computed with the first tokens alone. ValueError
        where a source comes later than these, or not at all."""
        if source is None:
            if self._sources is None or self.length == 0:
                raise ValueError("the cache holds no source yet: the first tokens of its rows need inputs.source")
            return self._sources
        if self.length:
            raise ValueError("the cache holds what its rows read already: rows go on without inputs.source or memory")
        source_positions_BS, source_starts = source
        if len(source_starts) != len(source_positions_BS):
            raise ValueError("inputs.source.cu_seqlens cannot be used with a cache: each row has one source")
        masks = AcrossMasks(positions_BT, document_starts, source_positions_BS, source_starts, device)
        self._sources = _Sources(torch.from_numpy(source_positions_BS >= 0).to(device))
        return _Filling(self._sources, masks)

    def reorder(self, rows: Tensor | Sequence[int]) -> None:
        """Keep row rows[i] as row i; rows may repeat (beam search) or be left out."""
        index = torch.as_tensor(rows, dtype=torch.int64).cpu()
        if self.next_position is None:
            raise ValueError("the cache is empty: there are no rows to reorder")
        self.next_position = self.next_position[index.numpy()]
        for memory in self._held:
            memory.reorder(index)

    def first_positions(self, n_rows: int) -> Ints:
        """(B,) where rows continue. Raises ValueError if the cache holds another number of rows."""
        if self.next_position is None:
            return np.zeros(n_rows, dtype=np.int64)
        if len(self.next_position) != n_rows:
            raise ValueError(f"the cache holds {len(self.next_position)} rows, the input has {n_rows}")
        return self.next_position

    def extend(self, positions_BT: Ints, document_starts: Ints, device: torch.device) -> "CachedAttention":
        """Make room for new tokens at these positions (negative = padding), which must continue the rows."""
        n_rows, row_length = positions_BT.shape
        if len(document_starts) != n_rows:
            raise ValueError("cu_seqlens cannot be used with a cache: each row of a cache is one document")
        if self.next_position is not None:
            lowest_B = np.where(positions_BT >= 0, positions_BT, np.iinfo(np.int64).max).min(axis=1)
            if (lowest_B < self.next_position).any():
                row = int(np.flatnonzero(lowest_B < self.next_position)[0])
                raise ValueError(
                    f"row {row} continues at {lowest_B[row]}, but the cache goes on at {self.next_position[row]}"
                )
        specs = [_within(spec, self._window) for spec in self._specs]
        prefill = AttentionMasks(specs, positions_BT, document_starts, device) if self.length == 0 else None
        self.next_position = np.maximum(self.first_positions(n_rows), positions_BT.max(axis=1) + 1)
        self.length += row_length
        for memory in self._memories.values():
            memory.extend(positions_BT)
        return CachedAttention(self._memories, positions_BT, prefill, self._window)

    def forget(self) -> None:
        """Drop what no later token can see. Called after each forward."""
        assert self.next_position is not None
        for kind, memory in self._memories.items():
            memory.forget(self.next_position, *_kind_within(kind, self._window))


def _kind_within(kind: MaskKind, window: int | None) -> MaskKind:
    """What layers of a kind see through a cache with a window."""
    mask, span = kind
    if window is None or mask == "chunk":  # whose chunks are no longer than the window
        return kind
    return "window", window if span is None else min(span, window)


def _within(spec: AttentionSpec, window: int | None) -> AttentionSpec:
    mask, span = _kind_within((spec.mask, spec.span), window)
    return replace(spec, mask=mask, span=span)


class CachedAttention:
    """Attention of new tokens to themselves and to what the cache remembers."""

    def __init__(
        self,
        memories: dict[MaskKind, "_Memory"],
        positions_BT: Ints,
        prefill: AttentionMasks | None,
        window: int | None,
    ) -> None:
        self._memories, self._window = memories, window
        self._positions_BT = positions_BT
        self._prefill = prefill
        self._single_masks: dict[_Memory, Tensor | None] = {}

    def __call__(
        self, layer: int, spec: AttentionSpec, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor
    ) -> Tensor:
        memory = self._memories[spec.mask, spec.span]
        keys, values = memory.append(layer, k_BTKd, v_BTKd)
        spec = _within(spec, self._window)
        if self._prefill is not None:
            return self._prefill(layer, spec, q_BTHd, k_BTKd, v_BTKd)
        k, v = keys.transpose(1, 2), values.transpose(1, 2)
        scores = scores_of(spec)
        parts = [
            masked_attention(q.transpose(1, 2), k, v, mask, scores).transpose(1, 2)
            for q, mask in zip(q_BTHd.split(QUERY_BLOCK, dim=1), self._masks(spec, memory, q_BTHd.device), strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _masks(self, spec: AttentionSpec, memory: "_Memory", device: torch.device) -> Iterator[Tensor | None]:
        """One (B, 1, t, S) bool mask for each block of queries, None where everything is seen."""
        key = spec.mask, spec.span
        if self._positions_BT.shape[1] <= QUERY_BLOCK:  # then all layers of a kind share one
            if memory not in self._single_masks:
                self._single_masks[memory] = _mask(key, self._positions_BT, memory, device)
            yield self._single_masks[memory]
            return
        for low in range(0, self._positions_BT.shape[1], QUERY_BLOCK):
            yield _mask(key, self._positions_BT[:, low : low + QUERY_BLOCK], memory, device)


def _mask(kind: MaskKind, query_BT: Ints, memory: "_Memory", device: torch.device) -> Tensor | None:
    seen = visible(query_BT, memory.positions_BS, *kind)
    return None if seen.all() else torch.from_numpy(seen[:, None]).to(device)


class _Sources:
    """Keys and values of what an encoder made of the rows' sources. Rows of one source have the same of each layer, so
    that nothing moves where rows change places with others of theirs."""

    def __init__(self, seen_BS: Tensor) -> None:
        """seen_BS: bool, which of the source tokens are no padding."""
        self._seen_BS = seen_BS
        self._source_of_row = torch.arange(len(seen_BS), device="cpu")
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for pair in self._layers.values() for x in pair)

    def remember(self, layer: int, k_BSKd: Tensor, v_BSKd: Tensor) -> None:
        self._layers[layer] = k_BSKd.transpose(1, 2).contiguous(), v_BSKd.transpose(1, 2).contiguous()

    def reorder(self, index: Tensor) -> None:
        found = self._source_of_row[index]
        if torch.equal(found, self._source_of_row):
            return
        self._source_of_row, rows = found, index.to(self._seen_BS.device)
        self._seen_BS = self._seen_BS.index_select(0, rows)
        for layer, (k, v) in self._layers.items():
            self._layers[layer] = k.index_select(0, rows), v.index_select(0, rows)

    def __call__(
        self, layer: int, spec: AttentionSpec, q_BTHd: Tensor, k_BSKd: Tensor | None, v_BSKd: Tensor | None
    ) -> Tensor:
        """Attention to what is remembered."""
        k, v = self._layers[layer]
        seen = None if self._seen_BS.all() else self._seen_BS[:, None, None]
        scores = Scores(spec.scale, spec.softcap, None, causal=False, across=True)
        return masked_attention(q_BTHd.transpose(1, 2), k, v, seen, scores).transpose(1, 2)


@dataclass(frozen=True)
class _Filling:
    """Attention to the memory of a batch, whose keys and values are kept."""

    sources: _Sources
    masks: AcrossMasks

    def __call__(
        self, layer: int, spec: AttentionSpec, q_BTHd: Tensor, k_BSKd: Tensor | None, v_BSKd: Tensor | None
    ) -> Tensor:
        assert k_BSKd is not None and v_BSKd is not None
        self.sources.remember(layer, k_BSKd, v_BSKd)
        return self.masks(layer, spec, q_BTHd, k_BSKd, v_BSKd)


class _Memory:
    """What the layers of one kind of mask remember: all their buffers hold the slots that self.positions_BS lists."""

    def __init__(self, longest: int | None) -> None:
        self._longest = longest
        self.positions_BS: Ints = np.empty((0, 0), dtype=np.int64)
        self._start = 0  # slots of the buffers before it are forgotten
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for pair in self._buffers.values() for buffer in pair)

    def extend(self, positions_BT: Ints) -> None:
        old = self.positions_BS if self.positions_BS.size else positions_BT[:, :0]
        self.positions_BS = np.concatenate([old, positions_BT], axis=1)

    def append(self, layer: int, k_BTKd: Tensor, v_BTKd: Tensor) -> tuple[Tensor, Tensor]:
        """Write the newest slots of a layer and return all of its remembered keys and values, (B, S, K, d)."""
        end = self._start + self.positions_BS.shape[1]
        kept = end - k_BTKd.shape[1]
        old = self._buffers.get(layer, (k_BTKd[:, :0], v_BTKd[:, :0]))
        if end > old[0].shape[1]:
            old = tuple(_enlarged(buffer, kept, end, self._longest) for buffer in old)  # type: ignore[assignment]
        for buffer, new in zip(old, (k_BTKd, v_BTKd), strict=True):
            buffer[:, kept:end] = new
        self._buffers[layer] = old
        return old[0][:, self._start : end], old[1][:, self._start : end]

    def forget(self, next_position_B: Ints, mask: Mask, span: int | None) -> None:
        """Drop the oldest slots as far as they are padding or the next token does not see them, in every row."""
        if span is None:
            return
        lowest_B = next_position_B // span * span if mask == "chunk" else next_position_B - span + 1
        needed = (self.positions_BS >= np.maximum(lowest_B, 0)[:, None]).any(axis=0)
        dead = int(needed.argmax()) if needed.any() else needed.size
        self.positions_BS = self.positions_BS[:, dead:]
        self._start += dead
        alive = self.positions_BS.shape[1]
        # moving what is alive then costs less than what was written since the last move
        if self._start > max(alive, SPARE_SLOTS):
            low, high = self._start, self._start + alive
            for layer, pair in self._buffers.items():
                self._buffers[layer] = pair[0][:, low:high].clone(), pair[1][:, low:high].clone()
            self._start = 0

    def reorder(self, index: Tensor) -> None:
        self.positions_BS = self.positions_BS[index.numpy()]
        for layer, pair in self._buffers.items():
            rows = index.to(pair[0].device)
            self._buffers[layer] = pair[0].index_select(0, rows), pair[1].index_select(0, rows)


def _enlarged(buffer: Tensor, kept: int, needed: int, longest: int | None) -> Tensor:
    """A copy of the first `kept` slots with room for `needed` and half as many more, so that appending stays cheap; at
    first for no more than `needed` unless it is known that more come."""
    spare = max(SPARE_SLOTS, needed // 2) if buffer.shape[1] or longest is not None else 0
    capacity = needed + spare if longest is None else max(needed, min(needed + spare, longest))
    larger = buffer.new_empty(buffer.shape[0], capacity, *buffer.shape[2:])
    larger[:, :kept] = buffer[:, :kept]
    return larger
