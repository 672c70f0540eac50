"""Attention within the segments of a batch, causal or both ways, without a (B, T, T) mask.

On a GPU the segments go to the variable-length kernel; elsewhere equal segments are folded into the batch, and unequal
ones are grouped by padded length. Windows are folded once more: each stretch of a window's length sees itself and the
one before it, and both ways the one behind it.

Shapes: B batch, T tokens, N = B*T, H query heads, K kv heads, d head width, L segment length, S remembered keys.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llm.kernels.explicit_attention import explicit_attention
from llm.kernels.keyed import LostWeights
from llm.kernels.scores import PLAIN, Scores
from llm.kernels.segments import Segments, Slots

# torch's bf16 attention on a CPU: the forward is up to three times faster than in float32, but the backward pays for
# each small product and is up to five times slower (measured). So short segments are attended in float32, middling ones
# go forward in bf16 and backward in float32, long ones are bf16 both ways.
SHORT = 64  # segment length below which all is float32
WIDE_BACKWARD = 16384  # segment length x head width up to which the backward is float32


def segment_attention(
    q_BTHd: Tensor,
    k_BTKd: Tensor,
    v_BTKd: Tensor,
    segments: Segments,
    scores: Scores = PLAIN,
    dropout: LostWeights | None = None,
) -> Tensor:
    """Attention within each segment; (B, T, H, d)."""
    if has_varlen_kernel(q_BTHd) and scores.softcap is None and dropout is None:
        q, k, v = (x.flatten(0, 1) for x in (q_BTHd, k_BTKd, v_BTKd))
        return varlen_attention(q, k, v, segments.cu_seqlens, segments.max_length, scores).view_as(q_BTHd)
    if segments.common_length is not None:
        q, k, v = (x.reshape(-1, segments.common_length, *x.shape[2:]) for x in (q_BTHd, k_BTKd, v_BTKd))
        lost = None if dropout is None else dropout.folded(segments.common_length)
        return attended(q, k, v, scores, dropout=lost).reshape(q_BTHd.shape)
    slots = segments.slots
    if not torch.is_grad_enabled() and dropout is None:
        return _by_bucket(q_BTHd, k_BTKd, v_BTKd, slots, scores)
    q_slots, k_slots, v_slots = (
        _ToSlots.apply(x.flatten(0, 1), slots).split(slots.sizes) for x in (q_BTHd, k_BTKd, v_BTKd)
    )
    losses: Sequence[LostWeights | None] = [None] * len(slots.lengths)
    if dropout is not None:
        losses = dropout.in_buckets(slots.token_of_slot, slots.sizes, slots.lengths)
    outs = []
    of_buckets = zip(slots.lengths, _seen(slots, scores), losses, q_slots, k_slots, v_slots, strict=True)
    for length, seen, lost, *bucket in of_buckets:
        q, k, v = (x.unflatten(0, (-1, length)) for x in bucket)
        outs.append(attended(q, k, v, scores, seen, lost).flatten(0, 1))
    return _FromSlots.apply(torch.cat(outs), slots).view_as(q_BTHd)


def _by_bucket(q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor, slots: Slots, scores: Scores) -> Tensor:
    """The same bits without gradients: a bucket's tokens that lie together as they are to be are not moved."""
    flat = [x.flatten(0, 1) for x in (q_BTHd, k_BTKd, v_BTKd)]
    out = torch.empty_like(flat[0])
    for bucket, seen in zip(slots.buckets, _seen(slots, scores), strict=True):
        if bucket.start is not None:
            here = slice(bucket.start, bucket.start + len(bucket.token_of_slot))
            q, k, v = (x[here].unflatten(0, (-1, bucket.length)) for x in flat)
            out[here] = attended(q, k, v, scores, seen).flatten(0, 1)
        else:
            q, k, v = (x.index_select(0, bucket.token_of_slot).unflatten(0, (-1, bucket.length)) for x in flat)
            made = attended(q, k, v, scores, seen).flatten(0, 1)
            out.index_copy_(0, bucket.tokens, made.index_select(0, bucket.slots))
    return out.view_as(q_BTHd)


def _seen(slots: Slots, scores: Scores) -> Sequence[Tensor | None]:
    """Of each bucket, the keys that are to be seen; None where nothing hides any but what lies ahead."""
    return [None] * len(slots.lengths) if scores.causal else slots.keys_seen


def masked_attention(
    q_BHTd: Tensor, k_BKSd: Tensor, v_BKSd: Tensor, seen_B1TS: Tensor | None, scores: Scores
) -> Tensor:
    """Attention to the keys that `seen` says, all of them where it is None; (B, H, T, d). Windows are the mask's."""
    if scores.softcap is None:
        return F.scaled_dot_product_attention(
            q_BHTd, k_BKSd, v_BKSd, attn_mask=seen_B1TS, scale=scores.scale, enable_gqa=True
        )
    q, k, v = (x.float().unflatten(1, (k_BKSd.shape[1], -1)) for x in (q_BHTd, k_BKSd, v_BKSd))
    scale = q.shape[-1] ** -0.5 if scores.scale is None else scores.scale
    capped = torch.tanh(q @ k.transpose(-1, -2) * (scale / scores.softcap)) * scores.softcap
    if seen_B1TS is not None:
        capped = capped.masked_fill(~seen_B1TS[:, :, None], -torch.inf)
    return (capped.softmax(-1) @ v).flatten(1, 2).to(q_BHTd.dtype)


def attend_few(q_BKGd: Tensor, k_BKSd: Tensor, v_BKSd: Tensor, hidden_B11S: Tensor, scores: Scores) -> Tensor:
    """Attention of the few queries of each kv head to the keys that are not hidden from their row; (B, K, G, d). Each
    row by itself: its bits follow S, not B. Keys and values lie in larger buffers, head after head.

    On a CPU by plain products, which take two thirds of the time of torch's fused kernel, or less (measured).
    """
    if q_BKGd.device.type != "cpu" or scores.softcap is not None:
        return masked_attention(q_BKGd, k_BKSd, v_BKSd, ~hidden_B11S, scores)
    scale = q_BKGd.shape[-1] ** -0.5 if scores.scale is None else scores.scale
    shape_BKGd, k, v = q_BKGd.shape, k_BKSd.flatten(0, 1), v_BKSd.flatten(0, 1)  # views: heads lie at one distance
    scores_NGS = torch.bmm((q_BKGd * scale).flatten(0, 1), k.transpose(1, 2))
    scores_NGS.view(*shape_BKGd[:3], -1).masked_fill_(hidden_B11S, -torch.inf)
    return torch.bmm(scores_NGS.softmax(-1), v).view(shape_BKGd)


def full_attention(q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor, scores: Scores = PLAIN) -> Tensor:
    """Attention of each token of a row to all tokens of it; (B, T, H, d)."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHd, k_BTKd, v_BTKd))
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:  # its backward in bf16 is slow
        q, k, v = q.float(), k.float(), v.float()
    return masked_attention(q, k, v, None, scores).transpose(1, 2).to(q_BTHd.dtype)


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


def attended(
    q_BLHd: Tensor,
    k_BLKd: Tensor,
    v_BLKd: Tensor,
    scores: Scores,
    seen_BL: Tensor | None = None,
    dropout: LostWeights | None = None,
) -> Tensor:
    """Of segments of one length; (B, L, H, d). seen: bool, the keys that queries which see both ways may see; None =
    all. Where scores are across, keys and values are as many as their own sequences have."""
    length, width = max(q_BLHd.shape[1], k_BLKd.shape[1]), q_BLHd.shape[-1]
    if scores.softcap is not None or dropout is not None:
        return explicit_attention(q_BLHd, k_BLKd, v_BLKd, scores, seen_BL, dropout)
    mask = None if seen_BL is None else seen_BL[:, None, None]
    if scores.window is not None and length > scores.window:
        if scores.causal:
            return _windowed(q_BLHd, k_BLKd, v_BLKd, scores)
        if mask is None:
            return _windowed_both_ways(q_BLHd, k_BLKd, v_BLKd, scores)
        # padded segments are short; padding must see something: itself
        mask = (mask & _near(length, length, scores.window, mask.device)) | _near(length, length, 1, mask.device)
    q, k, v = (x.transpose(1, 2) for x in (q_BLHd, k_BLKd, v_BLKd))
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and length * width <= WIDE_BACKWARD:
        if length < SHORT:
            wide = _sdpa(q.float(), k.float(), v.float(), scores.scale, mask, scores.causal)
            return wide.to(q.dtype).transpose(1, 2)
        out: Tensor = _WideBackward.apply(q, k, v, scores.scale, mask, scores.causal)
        return out.transpose(1, 2)
    return _sdpa(q, k, v, scores.scale, mask, scores.causal).transpose(1, 2)


def _sdpa(
    q_BHLd: Tensor,
    k_BKSd: Tensor,
    v_BKSd: Tensor,
    scale: float | None,
    mask: Tensor | None = None,
    causal: bool = True,
) -> Tensor:
    """mask: which keys are seen, instead of `causal`."""
    causal = causal and mask is None
    return F.scaled_dot_product_attention(
        q_BHLd, k_BKSd, v_BKSd, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=True
    )


def _near(queries: int, keys: int, window: int, device: torch.device, first: int = 0) -> Tensor:
    """Whether key and query are less than a window apart, (queries, keys) bool; the first key lies at `first`."""
    row, key = torch.arange(queries, device=device)[:, None], torch.arange(first, first + keys, device=device)
    return (key - row).abs() < window


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


def _windowed_both_ways(q_BLHd: Tensor, k_BLKd: Tensor, v_BLKd: Tensor, scores: Scores) -> Tensor:
    """Stretches of w tokens see themselves and those beside them, 3 w keys. Rows are folded into the heads, as the mask
    is that of a stretch: beside the first and the last there is nothing."""
    assert scores.window is not None
    (rows, length), w, dtype = q_BLHd.shape[:2], scores.window, q_BLHd.dtype
    n = -(-length // w)
    wide = dtype == torch.bfloat16 and q_BLHd.device.type == "cpu"
    q, k, v = (x.float() if wide else x for x in (q_BLHd, k_BLKd, v_BLKd))
    q = F.pad(q, (0, 0, 0, 0, 0, n * w - length)).unflatten(1, (n, w)).permute(1, 0, 3, 2, 4).flatten(1, 2)
    k, v = (
        F.pad(x, (0, 0, 0, 0, w, (n + 1) * w - length)).unfold(1, 3 * w, w).permute(1, 0, 2, 4, 3).flatten(1, 2)
        for x in (k, v)
    )
    key = torch.arange(n, device=q.device)[:, None] * w + torch.arange(-w, 2 * w, device=q.device)
    seen = _near(w, 3 * w, w, q.device, first=-w) & ((key >= 0) & (key < length))[:, None]
    seen |= (torch.arange(n * w, device=q.device) >= length).view(n, w, 1)  # what fills up the last stretch sees zeros
    out = _sdpa(q, k, v, scores.scale, seen[:, None]).unflatten(1, (rows, -1))
    return out.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :length].to(dtype)


class _WideBackward(torch.autograd.Function):
    """Attention on a CPU, forward in bf16 and backward in float32, each by torch's own kernel."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BHLd: Tensor,
        k_BKLd: Tensor,
        v_BKLd: Tensor,
        scale: float | None,
        seen: Tensor | None,
        causal: bool,
    ) -> Tensor:
        added = None if seen is None else torch.zeros_like(seen, dtype=q_BHLd.dtype).masked_fill_(~seen, -torch.inf)
        out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_BHLd, k_BKLd, v_BKLd, 0.0, causal, attn_mask=added, scale=scale
        )
        ctx.save_for_backward(q_BHLd, k_BKLd, v_BKLd, out, logsumexp)
        ctx.scale, ctx.added, ctx.causal = scale, added, causal
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        *saved, logsumexp = ctx.saved_tensors
        q, k, v, out, wide_grad = (x.float() for x in (*saved, grad))
        added = None if ctx.added is None else ctx.added.float()
        grad_q, grad_k, grad_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            wide_grad, q, k, v, out, logsumexp, 0.0, ctx.causal, attn_mask=added, scale=ctx.scale
        )
        return grad_q.to(grad.dtype), grad_k.to(grad.dtype), grad_v.to(grad.dtype), None, None, None


def has_varlen_kernel(q: Tensor) -> bool:
    """Whether the variable-length kernel takes this tensor: half precision and a head width that it knows, on a CUDA
    device from Ampere on.
    """
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16) or q.shape[-1] % 8 or q.shape[-1] > 256:
        return False
    return torch.cuda.get_device_capability(q.device)[0] >= 8


def varlen_attention(
    q_NHd: Tensor,
    k_NKd: Tensor,
    v_NKd: Tensor,
    cu_seqlens: Tensor,
    max_length: int,
    scores: Scores = PLAIN,
    of_keys: tuple[Tensor, int] | None = None,
) -> Tensor:
    """Attention within the segments [cu_seqlens[i], cu_seqlens[i+1]) on a CUDA device; (N, H, d). of_keys: bounds and
    largest length of the segments of the keys, where those are other ones."""
    from torch.nn.attention.varlen import varlen_attn

    groups = q_NHd.shape[1] // k_NKd.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (k_NKd, v_NKd))
    back = -1 if scores.window is None else scores.window - 1
    ahead = 0 if scores.causal else back
    given: dict[str, Any] = {} if scores.scale is None else {"scale": scores.scale}
    key_bounds, max_keys = (cu_seqlens, max_length) if of_keys is None else of_keys
    out = varlen_attn(q_NHd, k, v, cu_seqlens, key_bounds, max_length, max_keys, window_size=(back, ahead), **given)
    assert isinstance(out, Tensor)  # a pair only when auxiliary outputs are asked for
    return out
