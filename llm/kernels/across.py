"""Attention of the documents of one batch to those of another, as a decoder's to its encoder's: document i of the one
sees document i of the other, all of it, and nothing else. Padding sees nothing and is not seen.

On a GPU the documents go to the variable-length kernel; elsewhere pairs of one size are folded into the batch, and
others are grouped by their two padded lengths, each of which follows from the document's own length, so that no pair's
result depends on another.

Shapes: B rows, T queries and S keys of a row, N queries or keys of all rows, n pairs of documents, P padded slots, H
query heads, K kv heads, d head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llm.kernels.attention import attended, has_varlen_kernel, varlen_attention
from llm.kernels.keyed import LostWeights
from llm.kernels.scores import Scores
from llm.kernels.segments import Ints, padded_lengths


@dataclass(frozen=True)
class Documents:
    """The documents of one batch."""

    tokens: Ints
    """Flat numbers of those of its tokens that are no padding, document after document."""
    lengths: Ints
    """(n,) how many each has, none 0."""
    total: int
    """N, padding included."""

    @cached_property
    def common_length(self) -> int | None:
        """The length of every document, where all have the same and there is no padding."""
        even = len(self.lengths) > 0 and (self.lengths == self.lengths[0]).all() and len(self.tokens) == self.total
        return int(self.lengths[0]) if even else None

    def bounds(self) -> Ints:
        """(n + 1,) among `tokens`."""
        return np.append(0, np.cumsum(self.lengths))


@dataclass(frozen=True)
class Slots:
    """The documents of one batch, in buckets of pairs of about one size, each padded at its end with its last token."""

    total: int
    """N."""
    token_of_slot: Tensor
    """(P,)"""
    tokens: Tensor
    slots: Tensor
    """Those of its tokens that are no padding, and the real slot of each."""
    lengths: list[int]
    """Padded length of each bucket."""
    sizes: list[int]
    """Slots of each bucket."""
    seen: list[Tensor | None]
    """Of each bucket, (pairs, length) bool: which slots are no padding; None where all are."""

    @classmethod
    def of(cls, documents: Documents, buckets: Sequence[Ints], lengths: Sequence[int], device: torch.device) -> "Slots":
        """buckets: the numbers of the documents of each; lengths: to which they are padded."""
        bounds, found, real, seen = documents.bounds(), [], [], []
        for chosen, length in zip(buckets, lengths, strict=True):
            filled = documents.lengths[chosen][:, None]
            found.append(documents.tokens[bounds[chosen][:, None] + np.minimum(np.arange(length), filled - 1)])
            real.append(np.arange(length) < filled)
            seen.append(None if real[-1].all() else torch.from_numpy(real[-1]).to(device))
        token_of_slot = np.concatenate([tokens.reshape(-1) for tokens in found])
        slots = np.flatnonzero(np.concatenate([there.reshape(-1) for there in real]))
        return cls(
            documents.total,
            torch.from_numpy(token_of_slot).to(device),
            torch.from_numpy(token_of_slot[slots]).to(device),
            torch.from_numpy(slots).to(device),
            list(lengths),
            [tokens.size for tokens in found],
            seen,
        )


class Pairs:
    """Which documents of one batch see which of another."""

    def __init__(self, queries: Documents, keys: Documents, device: torch.device) -> None:
        """As many documents of the one as of the other."""
        self.queries, self.keys, self._device = queries, keys, device

    @property
    def common_lengths(self) -> tuple[int, int] | None:
        """Of queries and keys of every pair, where all have the same and there is no padding."""
        lengths = self.queries.common_length, self.keys.common_length
        return None if lengths[0] is None or lengths[1] is None else (lengths[0], lengths[1])

    @cached_property
    def slots(self) -> tuple[Slots, Slots]:
        """Of queries and of keys: the padded layout."""
        both = np.stack([padded_lengths(self.queries.lengths), padded_lengths(self.keys.lengths)])
        sizes, bucket_of_pair = np.unique(both, axis=1, return_inverse=True)
        buckets = [np.flatnonzero(bucket_of_pair.reshape(-1) == number) for number in range(sizes.shape[1])]
        queries, keys = (
            Slots.of(of, buckets, lengths, self._device)
            for of, lengths in zip((self.queries, self.keys), sizes.tolist(), strict=True)
        )
        return queries, keys

    @cached_property
    def varlen(self) -> tuple[tuple[Tensor, Tensor, int], tuple[Tensor, Tensor, int]]:
        """Of queries and of keys: tokens, bounds among them, and the largest length."""
        queries, keys = (
            (
                torch.from_numpy(of.tokens).to(self._device),
                torch.from_numpy(of.bounds().astype(np.int32)).to(self._device),
                int(of.lengths.max()),
            )
            for of in (self.queries, self.keys)
        )
        return queries, keys


def across_attention(
    q_BTHd: Tensor,
    k_BSKd: Tensor,
    v_BSKd: Tensor,
    pairs: Pairs,
    scale: float | None = None,
    softcap: float | None = None,
    dropout: LostWeights | None = None,
) -> Tensor:
    """(B, T, H, d), 0 for padding. scale, softcap: see `Scores`; dropout: of queries (B, T)."""
    scores = Scores(scale, softcap, None, causal=False, across=True)
    if len(pairs.queries.lengths) == 0:  # still a part of the graph, so that every weight has a gradient
        return q_BTHd * 0 + (k_BSKd.sum() + v_BSKd.sum()) * 0
    if has_varlen_kernel(q_BTHd) and softcap is None and dropout is None:
        return _varlen(q_BTHd, k_BSKd, v_BSKd, pairs, scores)
    if (lengths := pairs.common_lengths) is not None:
        q = q_BTHd.reshape(-1, lengths[0], *q_BTHd.shape[2:])
        k, v = (x.reshape(-1, lengths[1], *x.shape[2:]) for x in (k_BSKd, v_BSKd))
        lost = None if dropout is None else dropout.folded(lengths[0])
        return attended(q, k, v, scores, None, lost).reshape(q_BTHd.shape)
    queries, keys = pairs.slots
    q_slots, k_slots, v_slots = (
        _ToSlots.apply(x.flatten(0, 1), side).split(side.sizes)
        for x, side in zip((q_BTHd, k_BSKd, v_BSKd), (queries, keys, keys), strict=True)
    )
    losses: Sequence[LostWeights | None] = [None] * len(queries.sizes)
    if dropout is not None:
        losses = dropout.in_buckets(queries.token_of_slot, queries.sizes, queries.lengths)
    outs = []
    for number, lost in enumerate(losses):
        q = q_slots[number].unflatten(0, (-1, queries.lengths[number]))
        k, v = (x[number].unflatten(0, (-1, keys.lengths[number])) for x in (k_slots, v_slots))
        outs.append(attended(q, k, v, scores, keys.seen[number], lost).flatten(0, 1))
    return _FromSlots.apply(torch.cat(outs), queries).view_as(q_BTHd)


def _varlen(q_BTHd: Tensor, k_BSKd: Tensor, v_BSKd: Tensor, pairs: Pairs, scores: Scores) -> Tensor:
    (tokens, bounds, longest), (key_tokens, key_bounds, most_keys) = pairs.varlen
    of_keys = key_bounds, most_keys
    k, v = (x.flatten(0, 1) for x in (k_BSKd, v_BSKd))
    if len(key_tokens) < len(k):
        k, v = k.index_select(0, key_tokens), v.index_select(0, key_tokens)
    q = q_BTHd.flatten(0, 1)
    if len(tokens) == len(q):
        return varlen_attention(q, k, v, bounds, longest, scores, of_keys).view_as(q_BTHd)
    made = varlen_attention(q.index_select(0, tokens), k, v, bounds, longest, scores, of_keys)
    return torch.zeros_like(q).index_copy(0, tokens, made).view_as(q_BTHd)


class _ToSlots(torch.autograd.Function):
    """x[token_of_slot]. Nothing reads padding, so its gradient is exactly 0, and no token has two slots that count: no
    scattered sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, side: Slots) -> Tensor:
        ctx.side = side
        return x.index_select(0, side.token_of_slot)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        side: Slots = ctx.side
        whole = grad.new_zeros(side.total, *grad.shape[1:])
        return whole.index_copy_(0, side.tokens, grad.index_select(0, side.slots)), None


class _FromSlots(torch.autograd.Function):
    """Real slots at the places of their tokens, and 0 elsewhere; the gradient of padding is 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, side: Slots) -> Tensor:
        ctx.side = side
        return x.new_zeros(side.total, *x.shape[1:]).index_copy_(0, side.tokens, x.index_select(0, side.slots))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        side: Slots = ctx.side
        padded = grad.new_zeros(len(side.token_of_slot), *grad.shape[1:])
        return padded.index_copy_(0, side.slots, grad.index_select(0, side.tokens)), None
