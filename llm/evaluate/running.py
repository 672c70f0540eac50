"""Rows that run through a replica together and join and leave while others go on: see llm/row_cache.py.

A CPU's kernels for products follow the number of rows where these are few, and work through a tensor by vectors, with
another exp for what is left at its end. So rows are filled up with padding to numbers with which a row's bits are the
same whatever the others are.

Shapes: B rows, T tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm.args.layers import attention_specs
from llm.datatypes import TransformerInput
from llm.decoder import left_padded, source_of
from llm.kernels.grouped import FEWEST_ROWS
from llm.parallel.replica import Replica
from llm.row_cache import RowCache, rounded

Ints = NDArray[np.int64]
ROWS_ARE_MULTIPLES = 8
"""Of which, on a CPU in float32: with it, and widths that are multiples of 4, no vector is cut."""
TOKENS_ARE_MULTIPLES = 32
"""The same for numbers of which each token has one, such as the weights of experts."""


@dataclass(frozen=True)
class Beginning:
    """A prompt, which one or more rows go on from."""

    prompt: Sequence[int]
    images: Tensor | None = None
    """the tiles that fill its slots"""
    rows: int = 1
    source: Sequence[int] = ()
    """what the encoder of an encoder-decoder reads"""


class Rows(Protocol):
    """Rows of tokens that a model continues, each for as long as it likes."""

    joins: bool
    """Whether rows can join while others go on."""

    def join(self, beginnings: Sequence[Beginning], width: int) -> Tensor:
        """Take in rows after those there, the longest first. Float32 logits (n, V) of the token after each prompt.

        width: tokens that a row may have in the end.
        """

    def step(self, tokens_B: Ints, positions_B: Ints) -> Tensor:
        """Add a token to each row, at these positions. Float32 logits (B, V) of the next."""

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, in their order."""


def open_rows(replica: Replica) -> Rows:
    """No rows yet."""
    args = replica.model.args
    apart = not any(spec.stateful for spec in args.layer_specs()) and not args.encoder_layers
    return ApartRows(replica) if apart else TogetherRows(replica)


class ApartRows:
    """Rows whose bits are those that they have alone."""

    joins = True

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._caches = [RowCache(replica.model.args) for _ in replica.stages]
        vision = replica.model.args.vision
        self._filler = 1 if vision is not None and vision.patch_token_id == 0 else 0  # no slot of an image
        parameter = next(replica.model.parameters())
        on_cpu, half = replica.world.device.type == "cpu", parameter.dtype.itemsize == 2
        args = replica.model.args
        by_token = args.moe is not None or any(spec.temperature for spec in attention_specs(args.layer_specs()))
        self._multiple = FEWEST_ROWS if half else ROWS_ARE_MULTIPLES
        self._fewest = FEWEST_ROWS
        if by_token:
            self._multiple = self._fewest = TOKENS_ARE_MULTIPLES
        if not on_cpu:
            self._multiple = self._fewest = 1

    def join(self, beginnings: Sequence[Beginning], width: int) -> Tensor:
        for cache in self._caches:
            cache.expect(width)
        found = []
        lengths = rounded(np.array([len(one.prompt) for one in beginnings]), max(FEWEST_ROWS, self._fewest))
        for length, group in groupby(range(len(beginnings)), lambda place: int(lengths[place])):
            found.append(self._prefill(length, [beginnings[place] for place in group]))
        return torch.cat(found)

    def _prefill(self, length: int, given: Sequence[Beginning]) -> Tensor:
        tokens_BT = np.full((len(given), length), self._filler, dtype=np.int64)
        for row, one in enumerate(given):
            tokens_BT[row, : len(one.prompt)] = one.prompt
        for cache in self._caches:
            cache.take_in([one.rows for one in given])
        rows_B = np.minimum(np.arange(self._filled(len(given))), len(given) - 1)
        last_B = np.array([len(one.prompt) - 1 for one in given])[rows_B]
        positions_T = torch.arange(length, device="cpu")
        logits = self._forward(tokens_BT, positions_T, _tiles(given), (rows_B, last_B))
        return logits[_repeated(given)]

    def step(self, tokens_B: Ints, positions_B: Ints) -> Tensor:
        padding = self._filled(len(tokens_B)) - len(tokens_B)
        tokens_B1, positions_B1 = (
            np.pad(numbers, (0, padding), constant_values=filler)[:, None]
            for numbers, filler in ((tokens_B, self._filler), (positions_B, -1))
        )
        return self._forward(tokens_B1, torch.from_numpy(positions_B1))[: len(tokens_B)]

    def keep(self, rows: Sequence[int]) -> None:
        for cache in self._caches:
            cache.keep(rows)

    def _filled(self, rows: int) -> int:
        """With how many rows a model computes these."""
        return max(self._fewest, -(-rows // self._multiple) * self._multiple)

    def _forward(
        self, tokens_BT: Ints, positions: Tensor, images: Tensor | None = None, at: tuple[Ints, Ints] | None = None
    ) -> Tensor:
        device = self._replica.world.device
        tiles = None if images is None else images.to(device)
        inputs = TransformerInput(torch.from_numpy(tokens_BT).to(device), positions, images=tiles)
        places = None if at is None else (torch.from_numpy(at[0]).to(device), torch.from_numpy(at[1]).to(device))
        return self._replica.logits(inputs, self._caches, places)


class TogetherRows:
    """Rows that begin together, for models some of whose layers keep a state that others cannot join, and for
    encoder-decoders. Their last bits may follow their neighbours."""

    joins = False

    def __init__(self, replica: Replica) -> None:
        self._replica = replica

    def join(self, beginnings: Sequence[Beginning], width: int) -> Tensor:
        self._decoder = self._replica.decoder()
        source = source_of([one.source for one in beginnings]) if beginnings[0].source else None
        prompts = left_padded([one.prompt for one in beginnings])
        logits_BV = self._decoder.logits(*prompts, _tiles(beginnings), source)
        rows = _repeated(beginnings)
        if len(rows) > len(beginnings):
            self._decoder.keep(rows)
        return logits_BV[rows]

    def step(self, tokens_B: Ints, positions_B: Ints) -> Tensor:
        return self._decoder.logits(tokens_B[:, None], positions_B[:, None])

    def keep(self, rows: Sequence[int]) -> None:
        self._decoder.keep(list(rows))


def _tiles(beginnings: Sequence[Beginning]) -> Tensor | None:
    """Those of all images, in their order."""
    tiles = [one.images for one in beginnings if one.images is not None]
    return torch.cat(tiles) if tiles else None


def _repeated(beginnings: Sequence[Beginning]) -> list[int]:
    """Which beginning each row has."""
    return [place for place, one in enumerate(beginnings) for _ in range(one.rows)]
