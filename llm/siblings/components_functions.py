"""Transformer Components' functions: the causal mask, attention of heads that are given, the sinusoids.

Shapes: T queries, S keys, d head width, D model width.
"""

import math

import torch
from torch import Tensor, nn

from llm.layers.positions import sinusoids


def create_causal_mask(seq_len: int, device: torch.device | str | None = None) -> Tensor:
    """(T, T) float32, lower triangular: 1 where query t may see key s, as s <= t."""
    return torch.ones(seq_len, seq_len, device=device).tril()


def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v: (..., T, d) of queries (..., T, d) and keys and values (..., S, d).

    mask: 1 (or True) where a query sees a key, 0 elsewhere, of a shape that spreads over (..., T, S). A query that sees
    nothing gets 0. ValueError for a mask of other numbers.
    """
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    if mask is None:
        return scores.softmax(-1) @ value
    seen = mask != 0
    if mask.dtype != torch.bool and not torch.equal(seen.to(mask.dtype), mask):
        raise ValueError("mask is 1 where a query sees a key and 0 elsewhere; it holds other numbers")
    # the lowest number in the place of -inf, which alone in a row would give NaN
    weights = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1)
    return weights.masked_fill(~seen, 0) @ value


class PositionalEncoding(nn.Module):
    """Adds what distinguishes positions: sin(p / 10000^(2i/D)) at 2i, the cosine at 2i + 1. No table: there is no
    longest row."""

    def __init__(self, embed_dim: int, max_seq_len: int = 512) -> None:
        """max_seq_len: accepted as the document has it; nothing depends on it."""
        super().__init__()
        self.embed_dim, self.max_seq_len = embed_dim, max_seq_len

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """x (..., T, D) with the vectors of positions start to start + T - 1 added. ValueError for another width."""
        if x.shape[-1] != self.embed_dim:
            raise ValueError(f"states {tuple(x.shape)} must have embed_dim={self.embed_dim} numbers each")
        positions = torch.arange(start, start + x.shape[-2], device=x.device)
        return x + sinusoids(positions, self.embed_dim).to(x.dtype)
