"""Which tokens attend to which: segments, cut once per batch for each kind of mask among the layers.

Every mask of the model is "within a segment", causal or both ways: documents for global layers, documents cut at
in-document multiples of the chunk length for chunked layers; and in documents, a window may look only so far. So no
(B, T, T) mask is ever built.

Shapes: B batch, T tokens, N = B*T, H query heads, K kv heads, d head width, S segments, or keys of a cache.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm.args import AttentionSpec, Mask
from llm.kernels.attention import segment_attention
from llm.kernels.keyed import LostWeights
from llm.kernels.scores import Scores
from llm.kernels.segments import Ints, Segments
from llm.layers.dropout import AttentionDropout


class Attend(Protocol):
    """What an attention layer is given: attention of its queries to everything that they may see."""

    def __call__(
        self, layer: int, spec: AttentionSpec, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor
    ) -> Tensor:
        """layer: its number, by which keys and values are remembered."""


class AttentionMasks:
    """The segments of one batch, for every kind of mask among the layers. Where some rows are causal and others are
    not, each kind is attended by itself, and the rows then lie as they did; where padding stands among the tokens of a
    document, it goes behind them for that time.
    """

    def __init__(
        self,
        specs: Sequence[AttentionSpec],
        positions_BT: Ints,
        document_starts: Ints,
        device: torch.device,
        causal: bool | NDArray[np.bool_] = True,
        dropout: AttentionDropout | None = None,
    ) -> None:
        """positions_BT: position of each token, negative for padding; document_starts: rising flat indices, from 0.
        causal: whether tokens see none behind them, in all rows, or in each, (B,), where they differ."""
        self._dropout = dropout
        self._order: tuple[Tensor, Tensor] | None = None
        if (order := _padding_last(positions_BT, document_starts)) is not None:
            positions_BT = positions_BT.reshape(-1)[order].reshape(positions_BT.shape)
            there = torch.from_numpy(order).to(device)
            self._order = there, there.argsort()
        if any(spec.mask == "window" for spec in specs):
            _check_consecutive(positions_BT, document_starts)
        if isinstance(causal, bool):
            self._kinds = [_OneKind(specs, positions_BT, document_starts, device, causal)]
            return
        length = positions_BT.shape[1]
        row_of_document = document_starts // length
        self._kinds, self._rows = [], []
        for kind in (True, False):
            rows, kept = np.flatnonzero(causal == kind), causal[row_of_document] == kind
            starts = np.searchsorted(rows, row_of_document[kept]) * length + document_starts[kept] % length
            self._kinds.append(_OneKind(specs, positions_BT[rows], starts, device, kind))
            self._rows.append(torch.from_numpy(rows).to(device))
        self._place_B = torch.cat(self._rows).argsort()

    def __call__(
        self, layer: int, spec: AttentionSpec, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor
    ) -> Tensor:
        lost = None if self._dropout is None else self._dropout.of_layer(layer)
        if self._order is None:
            return self._by_kind(spec, q_BTHd, k_BTKd, v_BTKd, lost)
        order, place = self._order
        q, k, v = (_moved(x, order) for x in (q_BTHd, k_BTKd, v_BTKd))
        return _moved(self._by_kind(spec, q, k, v, None if lost is None else lost.of_tokens(order)), place)

    def _by_kind(
        self, spec: AttentionSpec, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor, lost: LostWeights | None
    ) -> Tensor:
        if len(self._kinds) == 1:
            return self._kinds[0](spec, q_BTHd, k_BTKd, v_BTKd, lost)
        made = []
        for kind, rows in zip(self._kinds, self._rows, strict=True):
            q, k, v = (x.index_select(0, rows) for x in (q_BTHd, k_BTKd, v_BTKd))
            made.append(kind(spec, q, k, v, None if lost is None else lost.of_rows(rows)))
        return torch.cat(made).index_select(0, self._place_B)


class _OneKind:
    """The segments of rows that are all causal, or all not."""

    def __init__(
        self,
        specs: Sequence[AttentionSpec],
        positions_BT: Ints,
        document_starts: Ints,
        device: torch.device,
        causal: bool,
    ) -> None:
        self._causal = causal
        self._segments: dict[int | None, Segments] = {}
        for spec in specs:
            chunk = _chunk(spec)
            if chunk not in self._segments:
                bounds = segment_bounds(positions_BT, document_starts, chunk)
                self._segments[chunk] = Segments(bounds, device)

    def __call__(
        self, spec: AttentionSpec, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor, dropout: LostWeights | None
    ) -> Tensor:
        segments, scores = self._segments[_chunk(spec)], scores_of(spec, self._causal)
        return segment_attention(q_BTHd, k_BTKd, v_BTKd, segments, scores, dropout)


def _moved(x: Tensor, order_N: Tensor) -> Tensor:
    """The flattened tokens of x in another order."""
    return x.flatten(0, 1).index_select(0, order_N).view_as(x)


def _padding_last(positions_BT: Ints, document_starts: Ints) -> Ints | None:
    """The flat tokens, the padding of each document behind the others; None where none stands between them."""
    padding = positions_BT.reshape(-1) < 0
    if not padding.any():
        return None
    document = np.repeat(np.arange(len(document_starts)), np.diff(np.append(document_starts, padding.size)))
    begins = ~padding  # a stretch of tokens
    begins[1:] &= padding[:-1] | (document[1:] != document[:-1])
    if np.bincount(document[begins], minlength=1).max() < 2:
        return None
    return np.lexsort((padding, document))


def scores_of(spec: AttentionSpec, causal: bool = True) -> Scores:
    """How a layer's scores become weights."""
    return Scores(spec.scale, spec.softcap, spec.span if spec.mask == "window" else None, causal)


def _chunk(spec: AttentionSpec) -> int | None:
    return spec.span if spec.mask == "chunk" else None


def _check_consecutive(positions_BT: Ints, document_starts: Ints) -> None:
    """Windows are counted in tokens, so positions must be."""
    positions = positions_BT.reshape(-1)
    inside = np.ones(positions.size, dtype=bool)
    inside[document_starts] = False
    gaps = inside[1:] & (positions[:-1] >= 0) & (positions[1:] >= 0) & (positions[1:] != positions[:-1] + 1)
    if gaps.any():
        row, column = divmod(int(np.flatnonzero(gaps)[0]) + 1, positions_BT.shape[1])
        raise ValueError(
            f"sliding windows need consecutive positions inside a document; row {row} has "
            f"{positions_BT[row, column - 1]} then {positions_BT[row, column]} at token {column}"
        )


def visible(query_BT: Ints, key_BS: Ints, mask: Mask, span: int | None) -> NDArray[np.bool_]:
    """Whether each query sees each key, by position; (B, T, S). Padding sees padding, as no query may see nothing."""
    seen: NDArray[np.bool_] = seen_by_position(query_BT[:, :, None], key_BS[:, None, :], mask, span)
    return seen


def seen_by_position(query: Any, key: Any, mask: Mask, span: int | None, causal: bool = True) -> Any:
    """The same of positions that broadcast together, arrays of numpy or tensors. causal: whether no query sees a key
    behind its own position."""
    seen = (key >= 0) & (query >= 0)
    if causal:
        seen = seen & (key <= query)
    if span is not None and mask == "chunk":
        seen = seen & (key // span == query // span)
    elif span is not None:
        seen = seen & (key > query - span)
        if not causal:
            seen = seen & (key < query + span)
    return seen | ((query < 0) & (key < 0))


def document_lengths(positions_BT: Ints, document_starts: Ints) -> Ints:
    """For each token one more than the largest position of its document, (B, T)."""
    flat = positions_BT.reshape(-1)
    longest = np.maximum.reduceat(flat, document_starts) + 1
    return np.repeat(longest, np.diff(np.append(document_starts, flat.size))).reshape(positions_BT.shape)


def starts(positions_BT: Ints, document_starts: Ints) -> NDArray[np.bool_]:
    """Whether each token is the first of a document or of padding, (B, T)."""
    found = np.zeros(positions_BT.size, dtype=bool)
    found[segment_bounds(positions_BT, document_starts, None)[:-1]] = True
    return found.reshape(positions_BT.shape)


def segment_bounds(positions_BT: Ints, document_starts: Ints, span: int | None) -> Ints:
    """Flat indices where segments begin, and B*T at the end.

    A segment begins with a document, between padding and tokens, and, given a span, where the position passes a
    multiple of it.
    """
    positions = positions_BT.reshape(-1)
    begins = np.zeros(positions.size, dtype=bool)
    begins[document_starts] = True
    begins[1:] |= (positions[1:] < 0) != (positions[:-1] < 0)
    if span is not None:
        begins[1:] |= positions[1:] // span != positions[:-1] // span
    return np.append(np.flatnonzero(begins), positions.size)
