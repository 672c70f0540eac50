"""Continuing prompts through the cache: greedy or sampled, any mix of prompt lengths, each row on its own.

A row's tokens depend on its prompt, its seed and the settings, never on the other rows: padding is invisible, and the
random numbers of a row are a function of (seed, row, step).

Shapes: B rows, T longest prompt, V vocabulary.
"""

from collections.abc import Collection, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm.cache import Cache
from llm.datatypes import TransformerInput
from llm.init import uniform
from llm.model import LLM


class Decoder(Protocol):
    """Rows of tokens that grow, and what a model makes of them."""

    def logits(self, tokens: NDArray[np.int64], positions: NDArray[np.int64]) -> Tensor:
        """Float32 logits (B, V) of the token after these, with which the rows go on; both (B, T)."""

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows alone."""


class Cached:
    """A whole model that keeps what it has made of the rows so far."""

    def __init__(self, model: LLM) -> None:
        self._model, self._cache = model, Cache(model.args)
        self._device = next(model.parameters()).device

    def logits(self, tokens: NDArray[np.int64], positions: NDArray[np.int64]) -> Tensor:
        inputs = TransformerInput(torch.from_numpy(tokens).to(self._device), torch.from_numpy(positions))
        hidden = self._model(inputs, cache=self._cache, return_hidden=True).hidden
        return self._model.logits(hidden[:, -1:])[:, 0]

    def keep(self, rows: list[int]) -> None:
        self._cache.reorder(rows)


@torch.no_grad()
def generate(
    model: LLM | Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_ids: Collection[int] = (),
    seed: int = 0,
) -> list[list[int]]:
    """The new tokens of each prompt, at most max_new_tokens; a stop token ends its row and is kept as the row's last.

    temperature 0 takes the most likely token. Else logits are divided by it, then cut to the top_k largest, then to the
    smallest set with probability above top_p, and drawn from. Raises ValueError for an empty prompt or a setting out of
    range.
    """
    _check(prompts, max_new_tokens, temperature, top_k, top_p)
    decoder = Cached(model) if isinstance(model, LLM) else model
    tokens, positions = _left_padded(prompts)
    new_tokens: list[list[int]] = [[] for _ in prompts]
    active = list(range(len(prompts)))
    for step in range(max_new_tokens):
        logits = decoder.logits(tokens, positions)
        if temperature == 0:
            chosen = logits.argmax(-1).cpu().numpy()
        else:
            draws = np.array([uniform(seed, f"generate.row{row}", step, step + 1)[0] for row in active])
            chosen = sample(logits, draws, temperature, top_k, top_p)
        for row, token in zip(active, chosen.tolist(), strict=True):
            new_tokens[row].append(token)
        going = [i for i, token in enumerate(chosen.tolist()) if token not in stop_ids]
        if not going or step + 1 == max_new_tokens:
            break
        if len(going) < len(active):
            decoder.keep(going)
            active = [active[i] for i in going]
        tokens, positions = chosen[going, None], positions[going, -1:] + 1
    return new_tokens


def sample(
    logits_BV: Tensor, uniform_B: NDArray[np.float64], temperature: float, top_k: int | None, top_p: float | None
) -> NDArray[np.int64]:
    """One token a row: where the row's uniform number falls in the cumulative probability, most likely token first."""
    scaled_BV, order_BV = (logits_BV.double() / temperature).sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        scaled_BV = scaled_BV[:, :top_k]
    p_BV = scaled_BV.softmax(-1)
    if top_p is not None:
        before_BV = p_BV.cumsum(-1) - p_BV
        p_BV = p_BV.masked_fill(before_BV > top_p, 0)
    cumulative_BV = p_BV.cumsum(-1)
    target_B1 = torch.from_numpy(uniform_B).to(p_BV.device)[:, None] * cumulative_BV[:, -1:]
    rank_B1 = (cumulative_BV <= target_B1).sum(-1, keepdim=True)
    return order_BV.gather(-1, rank_B1).squeeze(-1).cpu().numpy()


def _left_padded(prompts: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens and positions, (B, T): prompts end together, so that the last column has every row's next-token logits."""
    longest = max(len(prompt) for prompt in prompts)
    tokens = np.zeros((len(prompts), longest), dtype=np.int64)
    positions = np.full((len(prompts), longest), -1, dtype=np.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = prompt
        positions[row, longest - len(prompt) :] = np.arange(len(prompt))
    return tokens, positions


def _check(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("every prompt needs at least one token; tokenizer.prompt_ids begins an empty text")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if temperature < 0:
        raise ValueError(f"temperature={temperature} must be 0 (greedy) or positive")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1, or left out")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must lie in (0, 1], or be left out")
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise ValueError("top_k and top_p need a temperature above 0; at 0 the most likely token is taken")
