"""Rows of tokens that a model continues: what generation asks of it.

Shapes: B rows, T tokens, V vocabulary.
"""

from collections.abc import Sequence
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
        self, tokens: NDArray[np.int64], positions: NDArray[np.int64], images: Tensor | None = None
    ) -> Tensor:
        """Float32 logits (B, V) of the token after these, with which the rows go on; both (B, T). images: uint8 tiles
        (n, 3, S, S) that fill the slots among the tokens."""

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
        self, tokens: NDArray[np.int64], positions: NDArray[np.int64], images: Tensor | None = None
    ) -> Tensor:
        tiles = None if images is None else images.to(self._device)
        inputs = TransformerInput(torch.from_numpy(tokens).to(self._device), torch.from_numpy(positions), images=tiles)
        hidden = self._model(inputs, cache=self._cache, return_hidden=True).hidden
        return self._model.logits(hidden[:, -1:])[:, 0]

    def keep(self, rows: list[int]) -> None:
        self._cache.reorder(rows)


def left_padded(prompts: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens and positions, (B, T): prompts end together, so that the last column has every row's next-token logits."""
    longest = max(len(prompt) for prompt in prompts)
    tokens = np.zeros((len(prompts), longest), dtype=np.int64)
    positions = np.full((len(prompts), longest), -1, dtype=np.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = prompt
        positions[row, longest - len(prompt) :] = np.arange(len(prompt))
    return tokens, positions


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


def check_prompts(prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> None:
    """ValueError where a prompt is empty or `limits` are not a number of new tokens for each."""
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("every prompt needs at least one token; tokenizer.prompt_ids begins an empty text")
    if len(limits) != len(prompts):
        raise ValueError(f"max_new_tokens has {len(limits)} numbers for {len(prompts)} prompts")
    if min(limits) < 1:
        raise ValueError(f"max_new_tokens={min(limits)} must be at least 1")
