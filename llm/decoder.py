"""Rows of tokens that a model continues: what generation asks of it.

Shapes: B rows, T tokens, S source tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm.cache import Cache
from llm.datatypes import TransformerInput
from llm.generation.sampling import NonFiniteLogits
from llm.model import LLM


class Decoder(Protocol):
    """Rows of tokens that grow, and what a model makes of them."""

    def logits(
        self,
        tokens: NDArray[np.int64],
        positions: NDArray[np.int64],
        images: Tensor | None = None,
        source: TransformerInput | None = None,
    ) -> Tensor:
        """Float32 logits (B, V) of the token after these, with which the rows go on; both (B, T).

        images: uint8 tiles (n, 3, S, S) that fill the slots among the tokens. source: what the encoder of an
        encoder-decoder reads, given with the first tokens of the rows and never again.
        """

    def keep(self, rows: list[int]) -> None:
        """Go on with row rows[i] as row i; rows may be left out, and may repeat."""


class Cached:
    """A whole model that keeps what it has made of the rows so far."""

    def __init__(self, model: LLM, longest: int | None = None, window: int | None = None) -> None:
        """longest: tokens that a row will have in the end, so that no more memory is taken. window: newest positions
        that a token sees; None = all."""
        self._model, self._cache = model, Cache(model.args, longest, window)
        self._device = next(model.parameters()).device

    @torch.no_grad()
    def logits(
        self,
        tokens: NDArray[np.int64],
        positions: NDArray[np.int64],
        images: Tensor | None = None,
        source: TransformerInput | None = None,
    ) -> Tensor:
        inputs = inputs_of(tokens, positions, images, source, self._device)
        hidden = self._model(inputs, cache=self._cache, return_hidden=True).hidden
        return self._model.logits(hidden[:, -1:])[:, 0]

    def keep(self, rows: list[int]) -> None:
        self._cache.reorder(rows)


def inputs_of(
    tokens: NDArray[np.int64],
    positions: NDArray[np.int64],
    images: Tensor | None,
    source: TransformerInput | None,
    device: torch.device,
) -> TransformerInput:
    """What `Decoder.logits` is given, for a model on a device."""
    tiles = None if images is None else images.to(device)
    if source is not None:
        source = replace(source, tokens=source.tokens.to(device))
    return TransformerInput(
        torch.from_numpy(tokens).to(device), torch.from_numpy(positions), images=tiles, source=source
    )


@dataclass(frozen=True)
class Beginnings:
    """What rows begin with: prompts, and what goes with them. ValueError where these do not fit together."""

    prompts: Sequence[Sequence[int]]
    limits: Sequence[int]
    """most new tokens of each"""
    images: Sequence[Tensor | None] | None = None
    """of each prompt, the tiles that fill its slots, in their order: uint8 (n, 3, S, S), or floats"""
    sources: Sequence[Sequence[int]] | None = None
    """of each prompt, what the encoder of an encoder-decoder reads"""

    @classmethod
    def of(
        cls,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | Sequence[int],
        images: Sequence[Tensor | None] | None,
        sources: Sequence[Sequence[int]] | None,
    ) -> "Beginnings":
        """max_new_tokens: of all rows, or of each."""
        limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
        return cls(prompts, limits, images, sources)

    def __post_init__(self) -> None:
        if not self.prompts or any(len(prompt) == 0 for prompt in self.prompts):
            raise ValueError("every prompt needs at least one token; tokenizer.prompt_ids begins an empty text")
        if len(self.limits) != len(self.prompts):
            raise ValueError(f"max_new_tokens has {len(self.limits)} numbers for {len(self.prompts)} prompts")
        if min(self.limits) < 1:
            raise ValueError(f"max_new_tokens={min(self.limits)} must be at least 1")
        if self.sources is not None:
            if len(self.sources) != len(self.prompts):
                raise ValueError(f"there are {len(self.sources)} sources for {len(self.prompts)} prompts")
            if any(len(source) == 0 for source in self.sources):
                raise ValueError("every source needs at least one token; tokenizer.source_ids ends each with its mark")

    @property
    def longest(self) -> int:
        """Tokens that a row may have in the end, padding included."""
        return max(map(len, self.prompts)) + max(self.limits)

    def decoder(self, model: "LLM | Decoder") -> "Decoder":
        """What continues them. ValueError where a model with an encoder has nothing to read, or one without has."""
        if not isinstance(model, LLM):
            return model
        if model.args.encoder_layers and self.sources is None:
            raise ValueError("the model is an encoder-decoder: give sources, what its encoder is to read")
        if self.sources is not None and not model.args.encoder_layers:
            raise ValueError("sources are given, but the model has no encoder (model.encoder_layers=0)")
        return Cached(model, self.longest)

    def logits(self, decoder: "Decoder", tokens: NDArray[np.int64], positions: NDArray[np.int64]) -> Tensor:
        """Those after the first tokens of the rows."""
        tiles = [of_row for of_row in self.images or () if of_row is not None]
        images = torch.cat(tiles) if tiles else None
        if self.sources is None:
            return decoder.logits(tokens, positions, images)
        return decoder.logits(tokens, positions, images, source_of(self.sources))


def left_padded(prompts: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens and positions, (B, T): prompts end together, so that the last column has every row's next-token logits."""
    longest = max(len(prompt) for prompt in prompts)
    tokens = np.zeros((len(prompts), longest), dtype=np.int64)
    positions = np.full((len(prompts), longest), -1, dtype=np.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = prompt
        positions[row, longest - len(prompt) :] = np.arange(len(prompt))
    return tokens, positions


def right_padded(sources: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens and positions, (B, S): sources begin together."""
    longest = max(len(source) for source in sources)
    tokens = np.zeros((len(sources), longest), dtype=np.int64)
    positions = np.full((len(sources), longest), -1, dtype=np.int64)
    for row, source in enumerate(sources):
        tokens[row, : len(source)] = source
        positions[row, : len(source)] = np.arange(len(source))
    return tokens, positions


def source_of(sources: Sequence[Sequence[int]]) -> TransformerInput:
    """What `Decoder.logits` takes of the rows' sources."""
    ids, positions = map(torch.from_numpy, right_padded(sources))
    return TransformerInput(ids, positions)


def seen_ids(logits_BV: Tensor, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Which ids stand in each prompt, (B, V) bool."""
    seen_BV = torch.zeros_like(logits_BV, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        known = [token for token in prompt if token < logits_BV.shape[1]]
        seen_BV[row, torch.tensor(known, dtype=torch.int64, device=seen_BV.device)] = True
    return seen_BV


def check_finite(logits_BV: Tensor, rows: Sequence[int], step: int) -> None:
    """NonFiniteLogits where one is not. rows: which prompt each row continues; step: of the generation, from 0."""
    finite_BV = logits_BV.isfinite()
    if not finite_BV.all():
        bad = int((~finite_BV).any(-1).int().argmax())
        raise NonFiniteLogits(rows[bad], step + 1, int((~finite_BV[bad]).sum()), finite_BV.shape[-1])
