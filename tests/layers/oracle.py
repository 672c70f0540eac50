"""The definition of attention that every fast path is held against: a dense mask built from documents and positions."""

import numpy as np
import torch
from torch import Tensor

from llm.args import AttentionSpec


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, positions, document_starts, spec: AttentionSpec, causal=True, factors=1.0
) -> Tensor:
    """Attention over the flattened batch with a whole (N, N) mask, float64; q (B, T, H, d), k and v (B, T, K, d).
    causal: of all rows, or of each, (B,). factors: on the weights, (H, N, N)."""
    causal = np.repeat(np.broadcast_to(causal, q.shape[0]), q.shape[1])
    positions = np.asarray(positions).reshape(-1)
    document = np.searchsorted(np.asarray(document_starts), np.arange(positions.size), side="right")
    order = np.arange(positions.size)
    seen = (document[:, None] == document) & ((order[:, None] >= order) | ~causal[:, None])
    seen &= (positions[:, None] < 0) == (positions < 0)
    if spec.mask == "chunk":
        seen &= positions[:, None] // spec.span == positions // spec.span
    if spec.mask == "window":
        seen &= abs(order[:, None] - order) < spec.span
    groups = q.shape[2] // k.shape[2]
    q, k, v = (x.double().flatten(0, 1).transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(groups, dim=0) for x in (k, v))
    scores = q @ k.transpose(1, 2) * (q.shape[-1] ** -0.5 if spec.scale is None else spec.scale)
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    return scores.masked_fill(~torch.from_numpy(seen), -torch.inf).softmax(-1) * factors @ v
