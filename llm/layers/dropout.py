"""Dropout (Srivastava et al. 2014) whose masks are a function of where a value stands: of seed, step, site (a module,
and so its layer), row in the order of the data, position in the row, and element; of attention weights by the query's
place, and by head and place of the key in its segment. So they are the same on every layout, however a batch is cut,
after a resume and when a forward is repeated, and no generator is kept or moved. The bits are llm/kernels/keyed.py's.

A mask is made again for the backward, so none is kept, and activation checkpointing has nothing to repeat for it.

Shapes: R rows of the data, N tokens, F elements of a token's vector.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llm.kernels.graph_breaks import graph_break
from llm.kernels.keyed import GOLDEN, LEVELS, LostWeights, lost, lowest, mixed, with_numbers


def key_of(*what: object) -> int:
    """A signed word of 64 bits for anything that can be written."""
    digest = hashlib.blake2b(":".join(map(str, what)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def token_keys(seed: int, step: int, global_row_R: Tensor, n_tokens: int) -> Tensor:
    """A word for each token (N,) int64 of a batch of these rows (int64), all of the same length."""
    row_R = mixed(global_row_R * GOLDEN + key_of(seed, step))
    position = torch.arange(n_tokens // len(global_row_R), device=global_row_R.device)
    return mixed(row_R.unsqueeze(-1) + position * GOLDEN).flatten()


def source_keys(keys_N: Tensor, n_rows: int, source_length: int) -> Tensor:
    """A word for each token (n_rows * source_length,) of the source side of the rows that `keys_N` are of: made of that
    of the row's first token, and so of step and row, and of the place in the source.
    """
    place_S = torch.arange(source_length, device=keys_N.device)
    return with_numbers(keys_N.view(n_rows, -1)[:, :1] ^ key_of("source"), place_S).flatten()


def keys_or_drawn(keys_N: Tensor | None, tokens_BT: Tensor, training: bool) -> Tensor | None:
    """These keys; in training, with gradients, where none are given, such as torch's own generator draws: for whoever
    trains without a trainer. training: of a model in which something is dropped.
    """
    if keys_N is not None or not training or not torch.is_grad_enabled():
        return keys_N
    return torch.empty(tokens_BT.numel(), dtype=torch.int64, device=tokens_BT.device).random_()


def dropped(x: Tensor, keys_N: Tensor, site: int, rate: float, first: int = 0) -> Tensor:
    """x (..., F), of N tokens, with about a share `rate` of its elements 0 and the others as much larger.

    site: `key_of` the name of the place. first: number of the first element, where this rank has some of them.
    """
    out: Tensor = _Dropped.apply(x, keys_N, site, lowest(rate), first)
    return out


class _Dropped(torch.autograd.Function):
    """A linear map, and so its own backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keys_N: Tensor, site: int, count: int, first: int) -> Tensor:
        ctx.what = keys_N, site, count, first  # not as saved tensors, which checkpointing would repeat a forward for
        mask = lost(keys_N, site, count, first, x.shape[-1])
        return (x * (LEVELS / (LEVELS - count))).masked_fill_(mask.view(x.shape), 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _Dropped.apply(grad, *ctx.what), None, None, None, None


@dataclass(frozen=True)
class Dropout:
    """One place of a model where dropout is on."""

    site: int
    rate: float
    first: int = 0
    """Number of the first element of a token that this rank has."""

    @graph_break  # else each layer would be compiled for its own site
    def __call__(self, x: Tensor, keys_N: Tensor | None) -> Tensor:
        """x (..., F) of N tokens with some elements dropped; x itself without keys."""
        return x if keys_N is None else dropped(x, keys_N, self.site, self.rate, self.first)


def dropout_at(rate: float, kind: str, place: str) -> Dropout | None:
    """That of a place, as `layers.0.attention`; None where the rate is 0. kind: what of the place is dropped, as
    `residual`.
    """
    return Dropout(key_of(kind, place), rate) if rate else None


@dataclass(frozen=True)
class AttentionDropout:
    """What the attention of a batch drops of its weights, after the softmax."""

    keys_BT: Tensor
    """Of each query."""
    rate: float
    first_head: int = 0
    """Number of the first head that this rank has."""
    place: str = "layers.{layer}"
    """Where in the model it is."""

    def of_layer(self, layer: int) -> LostWeights:
        """Those of a layer."""
        site = key_of("weights", self.place.format(layer=layer))
        return LostWeights(self.keys_BT, site, lowest(self.rate), self.first_head)
