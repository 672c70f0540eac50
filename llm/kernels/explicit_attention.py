"""Attention by weights that are made, causal, both ways or to another sequence: for what no fused kernel of torch
knows, which are capped scores, c tanh(s / c), and dropout of weights by keys.

For some queries at a time, in float32, and again in the backward, so that scores of (L, L) never exist, and no mask of
dropout is kept. With dropout it takes two to four times as long as torch's fused attention, forward and backward
(measured on one core of a CPU: 2.0 to 3.2 in float32, 2.3 to 4.3 in bf16, segments of 48 to 2048 tokens; on a GPU not
measured), and BYTES_A_WEIGHT of memory for each weight that exists at a time.

Shapes: B batch, L segment length, of keys and values that of another sequence where scores are across, H query heads, K
kv heads, d head width.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llm.kernels.dtypes import wide_dtype
from llm.kernels.keyed import LostWeights
from llm.kernels.scores import Scores

QUERIES = 256
"""Whose weights exist at a time."""
LARGEST = 1 << 22
"""Weights that exist at a time where some are dropped, unless they are of FEWEST queries."""
FEWEST = 16
BYTES_A_WEIGHT = 29
"""What the backward takes of memory for each weight of these, masks and what makes them included: 25 to 29 were
measured."""


def explicit_attention(
    q_BLHd: Tensor,
    k_BLKd: Tensor,
    v_BLKd: Tensor,
    scores: Scores,
    seen_BL: Tensor | None = None,
    dropout: LostWeights | None = None,
) -> Tensor:
    """(B, L, H, d), with a window or without. seen: bool, keys that may be seen; None = all. dropout: of queries
    (B, L)."""
    out: Tensor = _Explicit.apply(q_BLHd, k_BLKd, v_BLKd, scores, seen_BL, dropout)
    return out


def weights_at_once(n_rows: int, heads: int, length: int) -> int:
    """Of how many queries of each of so many segments weights exist at a time where some are dropped."""
    return max(FEWEST, min(QUERIES, LARGEST // (n_rows * heads * length)))


class _Explicit(torch.autograd.Function):
    """See the top of this file."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BLHd: Tensor,
        k_BLKd: Tensor,
        v_BLKd: Tensor,
        scores: Scores,
        seen_BL: Tensor | None,
        dropout: LostWeights | None,
    ) -> Tensor:
        ctx.save_for_backward(q_BLHd, k_BLKd, v_BLKd)
        ctx.what = scores, seen_BL, dropout
        q, k, v = _wide_heads(q_BLHd, k_BLKd, v_BLKd)
        pieces = []
        for rows, keys in _query_blocks(q, k, scores, dropout):
            p, _ = _weights(q[:, :, :, rows], k[:, :, :, keys], rows, keys, scores, seen_BL)
            if dropout is not None:
                p = _dropped_(p, _lost(dropout, p, rows, keys), dropout)
            pieces.append(torch.matmul(p, v[:, :, :, keys]))
        return torch.cat(pieces, dim=3).flatten(1, 2).transpose(1, 2).to(q_BLHd.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        q_BLHd, k_BLKd, v_BLKd = ctx.saved_tensors
        scores, seen_BL, dropout = ctx.what
        q, k, v = _wide_heads(q_BLHd, k_BLKd, v_BLKd)
        grad_out = grad.to(q.dtype).transpose(1, 2).unflatten(1, (k.shape[1], -1))
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        scale = _scale(q, scores)
        for rows, keys in _query_blocks(q, k, scores, dropout):
            p, slope = _weights(q[:, :, :, rows], k[:, :, :, keys], rows, keys, scores, seen_BL)
            g = grad_out[:, :, :, rows]
            grad_p = torch.matmul(g, v[:, :, :, keys].transpose(-1, -2))
            left = p
            if dropout is not None:
                where = _lost(dropout, p, rows, keys)
                grad_p, left = _dropped_(grad_p, where, dropout), _dropped_(p.clone(), where, dropout)
            grad_v[:, :, :, keys] += torch.matmul(left.transpose(-1, -2), g).sum(2, keepdim=True)
            grad_s = p * (grad_p - (grad_p * p).sum(-1, keepdim=True))
            grad_s = (grad_s if slope is None else grad_s * slope) * scale
            grad_q[:, :, :, rows] = torch.matmul(grad_s, k[:, :, :, keys])
            grad_k[:, :, :, keys] += torch.matmul(grad_s.transpose(-1, -2), q[:, :, :, rows]).sum(2, keepdim=True)
        back = (x.flatten(1, 2).transpose(1, 2).to(grad.dtype) for x in (grad_q, grad_k, grad_v))
        return (*back, None, None, None)  # type: ignore[return-value]


def _wide_heads(q_BLHd: Tensor, k_BLKd: Tensor, v_BLKd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, K, H/K, L, d) queries, (B, K, 1, L, d) keys and values, at least float32."""
    wide = wide_dtype(q_BLHd)
    n_kv = k_BLKd.shape[2]
    q, k, v = (x.to(wide).transpose(1, 2).unflatten(1, (n_kv, -1)) for x in (q_BLHd, k_BLKd, v_BLKd))
    return q, k, v


def _query_blocks(
    q: Tensor, k: Tensor, scores: Scores, dropout: LostWeights | None
) -> Iterator[tuple[slice, slice]]:
    """Some queries at a time, and the keys that any of them sees."""
    n_rows, n_kv, groups, length, _ = q.shape
    n_keys = k.shape[3]
    step = QUERIES if dropout is None else weights_at_once(n_rows, n_kv * groups, n_keys)
    reach = max(length, n_keys) if scores.window is None else scores.window - 1
    for low in range(0, length, step):
        high = min(low + step, length)
        yield slice(low, high), slice(max(0, low - reach), high if scores.causal else min(n_keys, high + reach))


def _scale(q: Tensor, scores: Scores) -> float:
    return float(q.shape[-1] ** -0.5 if scores.scale is None else scores.scale)


def _weights(
    q: Tensor, k: Tensor, rows: slice, keys: slice, scores: Scores, seen_BL: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Weights of the keys for each query, and the slope of the cap at its scores where there is one."""
    cap = scores.softcap
    made = torch.matmul(q, k.transpose(-1, -2)) * (_scale(q, scores) / (cap or 1))
    curved = made if cap is None else torch.tanh(made)
    row = torch.arange(rows.start, rows.stop, device=q.device)[:, None]
    key = torch.arange(keys.start, keys.stop, device=q.device)
    hidden = key > row if scores.causal else torch.zeros_like(key > row)
    if scores.window is not None:
        hidden = hidden | ((key - row).abs() >= scores.window)
    if seen_BL is not None:
        hidden = hidden | ~seen_BL[:, None, None, None, keys]
        if not scores.across:
            hidden = hidden & (key != row)  # padding must see something: itself
    weights = (curved if cap is None else curved * cap).masked_fill(hidden, -torch.inf).softmax(-1)
    return weights, None if cap is None else 1 - curved.square()


def _lost(dropout: LostWeights, p: Tensor, rows: slice, keys: slice) -> Tensor:
    """Which of these weights are dropped, in their shape."""
    return dropout.where(p.shape[1] * p.shape[2], rows, keys).view(p.shape)


def _dropped_(x: Tensor, where: Tensor, dropout: LostWeights) -> Tensor:
    return x.mul_(dropout.scale).masked_fill_(where, 0)
