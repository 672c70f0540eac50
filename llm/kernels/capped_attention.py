"""Attention with capped scores, causal or both ways, c tanh(s / c), which no fused kernel of torch knows.

For some queries at a time, in float32, and again in the backward, so that scores of (L, L) never exist.

Shapes: B batch, L segment length, H query heads, K kv heads, d head width.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llm.kernels.dtypes import wide_dtype
from llm.kernels.scores import Scores

CAPPED_QUERIES = 256  # whose capped scores exist at a time


def capped_attention(
    q_BLHd: Tensor, k_BLKd: Tensor, v_BLKd: Tensor, scores: Scores, seen_BL: Tensor | None = None
) -> Tensor:
    """(B, L, H, d) for scores with a softcap, with a window or without. seen: bool, keys that may be seen; None = all.
    """
    out: Tensor = _Capped.apply(q_BLHd, k_BLKd, v_BLKd, scores, seen_BL)
    return out


class _Capped(torch.autograd.Function):
    """Some queries at a time, in float32, and again in the backward, so that scores of (L, L) never exist."""

    @staticmethod
    def forward(
        ctx: Any, q_BLHd: Tensor, k_BLKd: Tensor, v_BLKd: Tensor, scores: Scores, seen_BL: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(q_BLHd, k_BLKd, v_BLKd)
        ctx.scores, ctx.seen = scores, seen_BL
        q, k, v = _wide_heads(q_BLHd, k_BLKd, v_BLKd)
        pieces = [
            torch.matmul(_weights(q[:, :, :, rows], k[:, :, :, keys], rows, keys, scores, seen_BL)[0], v[:, :, :, keys])
            for rows, keys in _query_blocks(q.shape[3], scores)
        ]
        return torch.cat(pieces, dim=3).flatten(1, 2).transpose(1, 2).to(q_BLHd.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q_BLHd, k_BLKd, v_BLKd = ctx.saved_tensors
        scores: Scores = ctx.scores
        q, k, v = _wide_heads(q_BLHd, k_BLKd, v_BLKd)
        grad_out = grad.to(q.dtype).transpose(1, 2).unflatten(1, (k.shape[1], -1))
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        scale = _scale(q, scores)
        for rows, keys in _query_blocks(q.shape[3], scores):
            p, slope = _weights(q[:, :, :, rows], k[:, :, :, keys], rows, keys, scores, ctx.seen)
            g = grad_out[:, :, :, rows]
            grad_v[:, :, :, keys] += torch.matmul(p.transpose(-1, -2), g).sum(2, keepdim=True)
            grad_p = torch.matmul(g, v[:, :, :, keys].transpose(-1, -2))
            grad_s = p * (grad_p - (grad_p * p).sum(-1, keepdim=True)) * slope * scale
            grad_q[:, :, :, rows] = torch.matmul(grad_s, k[:, :, :, keys])
            grad_k[:, :, :, keys] += torch.matmul(grad_s.transpose(-1, -2), q[:, :, :, rows]).sum(2, keepdim=True)
        back = (x.flatten(1, 2).transpose(1, 2).to(grad.dtype) for x in (grad_q, grad_k, grad_v))
        return (*back, None, None)  # type: ignore[return-value]


def _wide_heads(q_BLHd: Tensor, k_BLKd: Tensor, v_BLKd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, K, H/K, L, d) queries, (B, K, 1, L, d) keys and values, at least float32."""
    wide = wide_dtype(q_BLHd)
    n_kv = k_BLKd.shape[2]
    q, k, v = (x.to(wide).transpose(1, 2).unflatten(1, (n_kv, -1)) for x in (q_BLHd, k_BLKd, v_BLKd))
    return q, k, v


def _query_blocks(length: int, scores: Scores) -> Iterator[tuple[slice, slice]]:
    """Some queries at a time, and the keys that any of them sees."""
    reach = length if scores.window is None else scores.window - 1
    for low in range(0, length, CAPPED_QUERIES):
        high = min(low + CAPPED_QUERIES, length)
        yield slice(low, high), slice(max(0, low - reach), high if scores.causal else min(length, high + reach))


def _scale(q: Tensor, scores: Scores) -> float:
    return float(q.shape[-1] ** -0.5 if scores.scale is None else scores.scale)


def _weights(
    q: Tensor, k: Tensor, rows: slice, keys: slice, scores: Scores, seen_BL: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Weights of the keys for each query, and the slope of the cap at its scores."""
    assert scores.softcap is not None
    curved = torch.tanh(torch.matmul(q, k.transpose(-1, -2)) * (_scale(q, scores) / scores.softcap))
    row = torch.arange(rows.start, rows.stop, device=q.device)[:, None]
    key = torch.arange(keys.start, keys.stop, device=q.device)
    hidden = key > row if scores.causal else torch.zeros_like(key > row)
    if scores.window is not None:
        hidden = hidden | ((key - row).abs() >= scores.window)
    if seen_BL is not None:
        hidden = (hidden | ~seen_BL[:, None, None, None, keys]) & (key != row)  # padding must see something: itself
    weights = (curved * scores.softcap).masked_fill(hidden, -torch.inf).softmax(-1)
    return weights, 1 - curved.square()
