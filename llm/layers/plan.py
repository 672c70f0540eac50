"""Which tokens attend to which: causal segments, cut once per batch for each kind of mask, and attention over them.

Every mask of the model is "causal within a segment": documents for global layers, documents cut at in-document
multiples of the chunk length for chunked layers; and in documents, a window may look back only so far. So no (B, T, T)
mask is ever built. On a GPU the segments go to the variable-length kernel; elsewhere equal segments are folded into the
batch, and unequal ones are grouped by padded length. Windows are folded once more: each stretch of a window's length
sees itself and the one before it.

Shapes: B batch, T tokens, N = B*T, H query heads, K kv heads, d head width, S segments, L segment length.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from llm.args import LayerSpec

Ints = NDArray[np.int64]
PADDED_LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128)
# torch's bf16 attention on a CPU: the forward is up to three times faster than in float32, but the backward pays for
# each small product and is up to five times slower (measured). So short segments are attended in float32, middling ones
# go forward in bf16 and backward in float32, long ones are bf16 both ways.
SHORT = 64  # segment length below which all is float32
WIDE_BACKWARD = 16384  # segment length x head width up to which the backward is float32
CAPPED_QUERIES = 256  # whose capped scores exist at a time


class Attend(Protocol):
    """What an attention layer is given: attention of its queries to everything that it may see."""

    def attend(self, spec: LayerSpec, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor) -> Tensor: ...


class AttentionPlan:
    """The segments of one batch, for every kind of mask among the layers."""

    def __init__(
        self, specs: Sequence[LayerSpec], positions_BT: Ints, document_starts: Ints, device: torch.device
    ) -> None:
        """positions_BT: position of each token, negative for padding; document_starts: rising flat indices, from 0."""
        self._segments: dict[int | None, Segments] = {}
        for spec in specs:
            chunk = _chunk(spec)
            if chunk not in self._segments:
                bounds = segment_bounds(positions_BT, document_starts, chunk)
                self._segments[chunk] = Segments(bounds, device)
        if any(spec.mask == "window" for spec in specs):
            _check_consecutive(positions_BT, document_starts)

    def attend(self, spec: LayerSpec, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor) -> Tensor:
        scores = Scores(spec.scale, spec.softcap, spec.span if spec.mask == "window" else None)
        return attend(q_BTHd, k_BTKd, v_BTKd, self._segments[_chunk(spec)], scores)


def _chunk(spec: LayerSpec) -> int | None:
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


class Scores(NamedTuple):
    """How scores become weights."""

    scale: float | None = None
    """Factor on them; None = d^-1/2."""
    softcap: float | None = None
    """c: scores s become c tanh(s / c)."""
    window: int | None = None
    """How many tokens a query sees at most, its own included; None = all before it."""


PLAIN = Scores()


def document_lengths(positions_BT: Ints, document_starts: Ints) -> Ints:
    """For each token one more than the largest position of its document, (B, T)."""
    flat = positions_BT.reshape(-1)
    longest = np.maximum.reduceat(flat, document_starts) + 1
    return np.repeat(longest, np.diff(np.append(document_starts, flat.size))).reshape(positions_BT.shape)


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


@dataclass(frozen=True)
class Slots:
    """Segments ordered by padded length, each padded at its end: the layout that unequal segments are attended in."""

    token_of_slot: Tensor
    """(P,) flat token index; padding repeats its segment's last token, and no real query sees it there."""
    slot_of_token: Tensor
    """(N,) the real slot of each token."""
    lengths: list[int]
    """Padded length of each bucket."""
    sizes: list[int]
    """Slots of each bucket."""


class Segments:
    """A cut of the flattened batch into causal segments."""

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
        )


def padded_lengths(lengths: Ints) -> Ints:
    """Short segments are rounded up to one of a few lengths; long ones keep theirs, as a call each costs little beside
    their work."""
    steps = np.array(PADDED_LENGTHS)
    rounded = steps[np.minimum(np.searchsorted(steps, lengths), len(steps) - 1)]
    return np.maximum(lengths, rounded)


def attend(q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor, segments: Segments, scores: Scores = PLAIN) -> Tensor:
    """Causal attention within each segment; (B, T, H, d)."""
    if has_varlen_kernel(q_BTHd) and scores.softcap is None:
        q, k, v = (x.flatten(0, 1) for x in (q_BTHd, k_BTKd, v_BTKd))
        return varlen_causal(q, k, v, segments.cu_seqlens, segments.max_length, scores).view_as(q_BTHd)
    if segments.common_length is not None:
        q, k, v = (x.reshape(-1, segments.common_length, *x.shape[2:]) for x in (q_BTHd, k_BTKd, v_BTKd))
        return _causal(q, k, v, scores).reshape(q_BTHd.shape)
    slots = segments.slots
    q_slots, k_slots, v_slots = (
        _ToSlots.apply(x.flatten(0, 1), slots).split(slots.sizes) for x in (q_BTHd, k_BTKd, v_BTKd)
    )
    outs = []
    for length, *bucket in zip(slots.lengths, q_slots, k_slots, v_slots, strict=True):
        q, k, v = (x.unflatten(0, (-1, length)) for x in bucket)
        outs.append(_causal(q, k, v, scores).flatten(0, 1))
    return _FromSlots.apply(torch.cat(outs), slots).view_as(q_BTHd)


class _ToSlots(torch.autograd.Function):
    """x[token_of_slot]. Nothing reads padding, so its gradient is exactly 0, and going back is a plain selection, not a
    scattered sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Slots) -> Tensor:
        ctx.slots = slots
        return x.index_select(0, slots.token_of_slot)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.slots.slot_of_token), None


class _FromSlots(torch.autograd.Function):
    """x[slot_of_token]; the gradient of padding is 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Slots) -> Tensor:
        ctx.slots = slots
        return x.index_select(0, slots.slot_of_token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        padded = grad.new_zeros(len(ctx.slots.token_of_slot), *grad.shape[1:])
        return padded.index_copy_(0, ctx.slots.slot_of_token, grad), None


def _causal(q_BLHd: Tensor, k_BLKd: Tensor, v_BLKd: Tensor, scores: Scores) -> Tensor:
    length, width = q_BLHd.shape[1], q_BLHd.shape[-1]
    if scores.softcap is not None:
        capped: Tensor = _Capped.apply(q_BLHd, k_BLKd, v_BLKd, scores)
        return capped
    if scores.window is not None and length > scores.window:
        return _windowed(q_BLHd, k_BLKd, v_BLKd, scores)
    q, k, v = (x.transpose(1, 2) for x in (q_BLHd, k_BLKd, v_BLKd))
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and length * width <= WIDE_BACKWARD:
        if length < SHORT:
            return _sdpa(q.float(), k.float(), v.float(), scores.scale).to(q.dtype).transpose(1, 2)
        out: Tensor = _WideBackward.apply(q, k, v, scores.scale)
        return out.transpose(1, 2)
    return _sdpa(q, k, v, scores.scale).transpose(1, 2)


def _sdpa(
    q_BHLd: Tensor, k_BKSd: Tensor, v_BKSd: Tensor, scale: float | None, mask_LS: Tensor | None = None
) -> Tensor:
    return F.scaled_dot_product_attention(
        q_BHLd, k_BKSd, v_BKSd, attn_mask=mask_LS, is_causal=mask_LS is None, scale=scale, enable_gqa=True
    )


def _windowed(q_BLHd: Tensor, k_BLKd: Tensor, v_BLKd: Tensor, scores: Scores) -> Tensor:
    """Stretches of w tokens, folded into the batch: the first is causal, each other one sees 2 w keys, through a mask
    that is the same for all."""
    assert scores.window is not None
    length, w, dtype = q_BLHd.shape[1], scores.window, q_BLHd.dtype
    wide = dtype == torch.bfloat16 and q_BLHd.device.type == "cpu"
    stretches = []
    for x in (q_BLHd, k_BLKd, v_BLKd):
        padded = F.pad(x.float() if wide else x, (0, 0, 0, 0, 0, -length % w))
        stretches.append(padded.unflatten(1, (-1, w)).transpose(2, 3))  # (B, n, heads, w, d)
    q, k, v = stretches
    first = _sdpa(q[:, 0], k[:, 0], v[:, 0], scores.scale)
    row, key = torch.arange(w, device=q.device)[:, None], torch.arange(2 * w, device=q.device)
    seen = (key > row) & (key <= row + w)
    k2, v2 = (torch.cat([x[:, :-1], x[:, 1:]], dim=3).flatten(0, 1) for x in (k, v))
    rest = _sdpa(q[:, 1:].flatten(0, 1), k2, v2, scores.scale, seen).unflatten(0, (len(q), -1))
    joined = torch.cat([first[:, None], rest], dim=1).transpose(2, 3).flatten(1, 2)
    return joined[:, :length].to(dtype)


class _Capped(torch.autograd.Function):
    """Causal attention with capped scores, which no fused kernel of torch knows: for some queries at a time, in
    float32, and again in the backward, so that scores of (L, L) never exist."""

    @staticmethod
    def forward(ctx: Any, q_BLHd: Tensor, k_BLKd: Tensor, v_BLKd: Tensor, scores: Scores) -> Tensor:
        ctx.save_for_backward(q_BLHd, k_BLKd, v_BLKd)
        ctx.scores = scores
        q, k, v = _wide_heads(q_BLHd, k_BLKd, v_BLKd)
        pieces = [
            torch.matmul(_weights(q[:, :, :, rows], k[:, :, :, keys], rows, keys, scores)[0], v[:, :, :, keys])
            for rows, keys in _query_blocks(q.shape[3], scores.window)
        ]
        return torch.cat(pieces, dim=3).flatten(1, 2).transpose(1, 2).to(q_BLHd.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_BLHd, k_BLKd, v_BLKd = ctx.saved_tensors
        scores: Scores = ctx.scores
        q, k, v = _wide_heads(q_BLHd, k_BLKd, v_BLKd)
        grad_out = grad.to(q.dtype).transpose(1, 2).unflatten(1, (k.shape[1], -1))
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        scale = _scale(q, scores)
        for rows, keys in _query_blocks(q.shape[3], scores.window):
            p, slope = _weights(q[:, :, :, rows], k[:, :, :, keys], rows, keys, scores)
            g = grad_out[:, :, :, rows]
            grad_v[:, :, :, keys] += torch.matmul(p.transpose(-1, -2), g).sum(2, keepdim=True)
            grad_p = torch.matmul(g, v[:, :, :, keys].transpose(-1, -2))
            grad_s = p * (grad_p - (grad_p * p).sum(-1, keepdim=True)) * slope * scale
            grad_q[:, :, :, rows] = torch.matmul(grad_s, k[:, :, :, keys])
            grad_k[:, :, :, keys] += torch.matmul(grad_s.transpose(-1, -2), q[:, :, :, rows]).sum(2, keepdim=True)
        back = (x.flatten(1, 2).transpose(1, 2).to(grad.dtype) for x in (grad_q, grad_k, grad_v))
        return (*back, None)  # type: ignore[return-value]


def _wide_heads(q_BLHd: Tensor, k_BLKd: Tensor, v_BLKd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, K, H/K, L, d) queries, (B, K, 1, L, d) keys and values, at least float32."""
    wide = torch.promote_types(q_BLHd.dtype, torch.float32)
    n_kv = k_BLKd.shape[2]
    q, k, v = (x.to(wide).transpose(1, 2).unflatten(1, (n_kv, -1)) for x in (q_BLHd, k_BLKd, v_BLKd))
    return q, k, v


def _query_blocks(length: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """Some queries at a time, and the keys that any of them sees."""
    for low in range(0, length, CAPPED_QUERIES):
        high = min(low + CAPPED_QUERIES, length)
        yield slice(low, high), slice(0 if window is None else max(0, low - window + 1), high)


def _scale(q: Tensor, scores: Scores) -> float:
    return float(q.shape[-1] ** -0.5 if scores.scale is None else scores.scale)


def _weights(q: Tensor, k: Tensor, rows: slice, keys: slice, scores: Scores) -> tuple[Tensor, Tensor]:
    """Weights of the keys for each query, and the slope of the cap at its scores."""
    assert scores.softcap is not None
    curved = torch.tanh(torch.matmul(q, k.transpose(-1, -2)) * (_scale(q, scores) / scores.softcap))
    row = torch.arange(rows.start, rows.stop, device=q.device)[:, None]
    key = torch.arange(keys.start, keys.stop, device=q.device)
    hidden = key > row if scores.window is None else (key > row) | (key <= row - scores.window)
    weights = (curved * scores.softcap).masked_fill(hidden, -torch.inf).softmax(-1)
    return weights, 1 - curved.square()


class _WideBackward(torch.autograd.Function):
    """Causal attention on a CPU, forward in bf16 and backward in float32, each by torch's own kernel."""

    @staticmethod
    def forward(ctx: Any, q_BHLd: Tensor, k_BKLd: Tensor, v_BKLd: Tensor, scale: float | None) -> Tensor:
        out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_BHLd, k_BKLd, v_BKLd, 0.0, True, scale=scale
        )
        ctx.save_for_backward(q_BHLd, k_BKLd, v_BKLd, out, logsumexp)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        *saved, logsumexp = ctx.saved_tensors
        q, k, v, out, wide_grad = (x.float() for x in (*saved, grad))
        grad_q, grad_k, grad_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            wide_grad, q, k, v, out, logsumexp, 0.0, True, scale=ctx.scale
        )
        return grad_q.to(grad.dtype), grad_k.to(grad.dtype), grad_v.to(grad.dtype), None


def has_varlen_kernel(q: Tensor) -> bool:
    """Whether the variable-length kernel takes this tensor: half precision and a head width that it knows, on a CUDA
    device from Ampere on.
    """
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16) or q.shape[-1] % 8 or q.shape[-1] > 256:
        return False
    return torch.cuda.get_device_capability(q.device)[0] >= 8


def varlen_causal(
    q_NHd: Tensor, k_NKd: Tensor, v_NKd: Tensor, cu_seqlens: Tensor, max_length: int, scores: Scores = PLAIN
) -> Tensor:
    """Causal attention within the segments [cu_seqlens[i], cu_seqlens[i+1]) on a CUDA device; (N, H, d)."""
    from torch.nn.attention.varlen import varlen_attn

    groups = q_NHd.shape[1] // k_NKd.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (k_NKd, v_NKd))
    back = -1 if scores.window is None else scores.window - 1
    given: dict[str, Any] = {} if scores.scale is None else {"scale": scores.scale}
    out = varlen_attn(q_NHd, k, v, cu_seqlens, cu_seqlens, max_length, max_length, window_size=(back, 0), **given)
    assert isinstance(out, Tensor)  # a pair only when auxiliary outputs are asked for
    return out
