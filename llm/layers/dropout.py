"""Dropout (Srivastava et al. 2014) whose masks are a function of where a value stands: of seed, step, site (a module,
and so its layer), row in the order of the data, position in the row, and element. So they are the same on every layout,
however a batch is cut, after a resume and when a forward is repeated, and no generator is kept or moved.

A word of 64 bits, made by splitmix64 (Steele et al. 2014, "Fast splittable pseudorandom number generators"), decides
about four elements, 16 bits each: rates are multiples of 1/65536. Integers alone are used, with sums and products that
wrap around, so the bits are those of any machine whose words have their lowest byte first.

A mask is made again for the backward, so none is kept, and activation checkpointing has nothing to repeat for it.

Shapes: R rows of the data, N tokens, F elements of a token's vector.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llm.kernels.graph_breaks import graph_break

LANES = 4
LEVELS = 1 << 16
GOLDEN = -7046029254386353131
"""0x9E3779B97F4A7C15, as all words here a signed number of 64 bits."""
FACTORS = -4658895280553007687, -7723592293110705685
"""0xBF58476D1CE4E5B9 and 0x94D049BB133111EB."""


def key_of(*what: object) -> int:
    """A signed word of 64 bits for anything that can be written."""
    digest = hashlib.blake2b(":".join(map(str, what)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def token_keys(seed: int, step: int, global_row_R: Tensor, n_tokens: int) -> Tensor:
    """A word for each token (N,) int64 of a batch of these rows (int64), all of the same length."""
    row_R = _mixed(global_row_R * GOLDEN + key_of(seed, step))
    position = torch.arange(n_tokens // len(global_row_R), device=global_row_R.device)
    return _mixed(row_R.unsqueeze(-1) + position * GOLDEN).flatten()


def keys_or_drawn(keys_N: Tensor | None, tokens_BT: Tensor, training: bool) -> Tensor | None:
    """These keys; in training, with gradients, where none are given, such as torch's own generator draws: for whoever
    trains without a trainer. training: of a model in which something is dropped.
    """
    if keys_N is not None or not training or not torch.is_grad_enabled():
        return keys_N
    return torch.empty(tokens_BT.numel(), dtype=torch.int64, device=tokens_BT.device).random_()


def with_numbers(keys: Tensor, number: Tensor) -> Tensor:
    """Keys for choices that differ by a number (int64), as that of the expert that a token goes to."""
    return _mixed(keys + (number + 1) * GOLDEN)


def dropped(x: Tensor, keys_N: Tensor, site: int, rate: float, first: int = 0) -> Tensor:
    """x (..., F), of N tokens, with about a share `rate` of its elements 0 and the others as much larger.

    site: `key_of` the name of the place. first: number of the first element, where this rank has some of them.
    """
    out: Tensor = _Dropped.apply(x, keys_N, site, least_kept(rate), first)
    return out


def least_kept(rate: float) -> int:
    """How many of the 65,536 values of an element's 16 bits drop it; the lowest ones do."""
    return min(round(rate * LEVELS), LEVELS - 1)


class _Dropped(torch.autograd.Function):
    """A linear map, and so its own backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keys_N: Tensor, site: int, least: int, first: int) -> Tensor:
        ctx.what = keys_N, site, least, first  # not as saved tensors, which checkpointing would repeat a forward for
        lost = _lanes(keys_N, site, first, x.shape[-1]) < least - LEVELS // 2
        return (x * (LEVELS / (LEVELS - least))).masked_fill_(lost.view(x.shape), 0)

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


def _lanes(keys_N: Tensor, site: int, first: int, n: int) -> Tensor:
    """16 bits for each element, (N, n) int16."""
    low, high = first // LANES, -(-(first + n) // LANES)
    word = torch.arange(low, high, device=keys_N.device) * GOLDEN
    words = _mixed(_mixed(keys_N ^ site).unsqueeze(-1) + word)
    return words.view(torch.int16)[:, first - low * LANES :][:, :n]


def _mixed(z: Tensor) -> Tensor:
    """splitmix64's finaliser."""
    z = (z ^ _shifted(z, 30)) * FACTORS[0]
    z = (z ^ _shifted(z, 27)) * FACTORS[1]
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """z >> bits of an unsigned word."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
