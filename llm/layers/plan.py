"""Which tokens attend to which: causal segments, cut once per batch for each kind of mask, and attention over them.

Every mask of the model is "causal within a segment": documents for global layers, documents cut at in-document
multiples of the chunk length for chunked layers. So no (B, T, T) mask is ever built. On a GPU the segments go to the
variable-length kernel; elsewhere equal segments are folded into the batch, and unequal ones are grouped by padded
length.

Shapes: B batch, T tokens, N = B*T, H query heads, K kv heads, d head width, S segments, L segment length.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

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


class Attend(Protocol):
    """What an attention layer is given: attention of its queries to everything that it may see."""

    def attend(self, spec: LayerSpec, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor) -> Tensor: ...


class AttentionPlan:
    """The segments of one batch, for every kind of mask among the layers."""

    def __init__(
        self, specs: Iterable[LayerSpec], positions_BT: Ints, document_starts: Ints, device: torch.device
    ) -> None:
        """positions_BT: position of each token, negative for padding; document_starts: rising flat indices, from 0."""
        self._segments = {
            (spec.mask, spec.span): Segments(segment_bounds(positions_BT, document_starts, spec.span), device)
            for spec in specs
        }

    def attend(self, spec: LayerSpec, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor) -> Tensor:
        return attend(q_BTHd, k_BTKd, v_BTKd, self._segments[spec.mask, spec.span])


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


def attend(q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor, segments: Segments) -> Tensor:
    """Causal attention within each segment, scores scaled by d^-1/2; (B, T, H, d)."""
    if has_varlen_kernel(q_BTHd):
        q, k, v = (x.flatten(0, 1) for x in (q_BTHd, k_BTKd, v_BTKd))
        return varlen_causal(q, k, v, segments.cu_seqlens, segments.max_length).view_as(q_BTHd)
    if segments.common_length is not None:
        q, k, v = (x.reshape(-1, segments.common_length, *x.shape[2:]) for x in (q_BTHd, k_BTKd, v_BTKd))
        return _causal(q, k, v).reshape(q_BTHd.shape)
    slots = segments.slots
    q_slots, k_slots, v_slots = (
        _ToSlots.apply(x.flatten(0, 1), slots).split(slots.sizes) for x in (q_BTHd, k_BTKd, v_BTKd)
    )
    outs = []
    for length, *bucket in zip(slots.lengths, q_slots, k_slots, v_slots, strict=True):
        q, k, v = (x.unflatten(0, (-1, length)) for x in bucket)
        outs.append(_causal(q, k, v).flatten(0, 1))
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


def _causal(q_BLHd: Tensor, k_BLKd: Tensor, v_BLKd: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BLHd, k_BLKd, v_BLKd))
    length, width = q.shape[2:]
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and length * width <= WIDE_BACKWARD:
        if length < SHORT:
            return _sdpa(q.float(), k.float(), v.float()).to(q.dtype).transpose(1, 2)
        out: Tensor = _WideBackward.apply(q, k, v)
        return out.transpose(1, 2)
    return _sdpa(q, k, v).transpose(1, 2)


def _sdpa(q_BHLd: Tensor, k_BKLd: Tensor, v_BKLd: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q_BHLd, k_BKLd, v_BKLd, is_causal=True, enable_gqa=True)


class _WideBackward(torch.autograd.Function):
    """Causal attention on a CPU, forward in bf16 and backward in float32, each by torch's own kernel."""

    @staticmethod
    def forward(ctx: Any, q_BHLd: Tensor, k_BKLd: Tensor, v_BKLd: Tensor) -> Tensor:
        out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q_BHLd, k_BKLd, v_BKLd, 0.0, True)
        ctx.save_for_backward(q_BHLd, k_BKLd, v_BKLd, out, logsumexp)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        *saved, logsumexp = ctx.saved_tensors
        q, k, v, out, wide_grad = (x.float() for x in (*saved, grad))
        grad_q, grad_k, grad_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            wide_grad, q, k, v, out, logsumexp, 0.0, True
        )
        return grad_q.to(grad.dtype), grad_k.to(grad.dtype), grad_v.to(grad.dtype)


def has_varlen_kernel(q: Tensor) -> bool:
    """Whether the variable-length kernel takes this tensor: half precision and a head width that it knows, on a CUDA
    device from Ampere on.
    """
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16) or q.shape[-1] % 8 or q.shape[-1] > 256:
        return False
    return torch.cuda.get_device_capability(q.device)[0] >= 8


def varlen_causal(q_NHd: Tensor, k_NKd: Tensor, v_NKd: Tensor, cu_seqlens: Tensor, max_length: int) -> Tensor:
    """Causal attention within the segments [cu_seqlens[i], cu_seqlens[i+1]) on a CUDA device; (N, H, d)."""
    from torch.nn.attention.varlen import varlen_attn

    groups = q_NHd.shape[1] // k_NKd.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (k_NKd, v_NKd))
    out = varlen_attn(q_NHd, k, v, cu_seqlens, cu_seqlens, max_length, max_length, window_size=(-1, 0))
    assert isinstance(out, Tensor)  # a pair only when auxiliary outputs are asked for
    return out
