"""Random bits that are a function of a key and a number, so that no generator is kept or moved.

A word of 64 bits, made by splitmix64 (Steele et al. 2014, "Fast splittable pseudorandom number generators"), decides
about four elements, 16 bits each: rates are multiples of 1/65536. Integers alone are used, with sums and products that
wrap around, so the bits are those of any machine whose words have their lowest byte first.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

LANES = 4
LEVELS = 1 << 16
GOLDEN = -7046029254386353131
"""0x9E3779B97F4A7C15, as all words here a signed number of 64 bits."""
FACTORS = -4658895280553007687, -7723592293110705685
"""0xBF58476D1CE4E5B9 and 0x94D049BB133111EB."""


def mixed(z: Tensor) -> Tensor:
    """splitmix64's finaliser; int64."""
    z = _folded(z, 30).mul_(FACTORS[0])
    z = _folded(z, 27).mul_(FACTORS[1])
    return _folded(z, 31)


def _folded(z: Tensor, bits: int) -> Tensor:
    """z ^ (z >> bits) of an unsigned word; a new tensor."""
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1).bitwise_xor_(z)


def with_numbers(keys: Tensor, number: Tensor) -> Tensor:
    """Keys for choices that differ by a number (int64), as that of the expert that a token goes to."""
    return mixed(keys + (number + 1) * GOLDEN)


def lowest(rate: float) -> int:
    """How many of the LEVELS values of an element's bits are lost at a rate; they are the lowest."""
    return min(round(rate * LEVELS), LEVELS - 1)


def lost(keys: Tensor, site: int, count: int, first: int, n: int) -> Tensor:
    """Whether the elements first to first + n of each key (...) are among the lowest `count`; bool (..., n).

    site: a word for what the choices are about.
    """
    low, high = first // LANES, -(-(first + n) // LANES)
    word = torch.arange(low, high, device=keys.device) * GOLDEN
    words = mixed(mixed(keys ^ site).unsqueeze(-1) + word)
    lanes = words.view(torch.int16)[..., first - low * LANES :][..., :n]
    return lanes < count - LEVELS // 2


@dataclass(frozen=True)
class LostWeights:
    """Which weights of an attention are dropped: by query, head, and place of the key in the segment."""

    keys: Tensor
    """int64, of each query; (rows, tokens)."""
    site: int
    count: int
    """See `lowest`."""
    first_head: int
    """Number of the first head that this rank has."""

    @property
    def scale(self) -> float:
        """Factor on those that stay."""
        return LEVELS / (LEVELS - self.count)

    def of_rows(self, rows: Tensor) -> "LostWeights":
        """Of some of the rows, by their numbers."""
        return replace(self, keys=self.keys.index_select(0, rows))

    def of_tokens(self, order: Tensor) -> "LostWeights":
        """Of the same queries with the flattened tokens in another order."""
        return replace(self, keys=self.keys.flatten().index_select(0, order).view_as(self.keys))

    def folded(self, length: int) -> "LostWeights":
        """Of the same queries in rows of another length."""
        return replace(self, keys=self.keys.reshape(-1, length))

    def in_buckets(self, token_of_slot: Tensor, sizes: list[int], lengths: list[int]) -> list["LostWeights"]:
        """Of slots, so many a bucket, in rows of its length: see `Slots` in llm/kernels/segments.py."""
        buckets = self.keys.flatten().index_select(0, token_of_slot).split(sizes)
        return [replace(self, keys=keys.view(-1, length)) for keys, length in zip(buckets, lengths, strict=True)]

    def where(self, heads: int, rows: slice, keys: slice) -> Tensor:
        """Of queries (B, L): those of these rows, for each head and these keys; bool (B, heads, rows, keys)."""
        head = torch.arange(self.first_head, self.first_head + heads, device=self.keys.device)
        of_queries = with_numbers(self.keys[:, None, rows], head[:, None])
        return lost(of_queries, self.site, self.count, keys.start, keys.stop - keys.start)
