"""Continuing prompts through the cache: greedy or sampled, any mix of prompt lengths, each row on its own.

A row's tokens depend on its prompt, its seed and the settings, never on the other rows: padding is invisible, and the
random numbers of a row are a function of (seed, the row's key, step).

Shapes: B rows, T longest prompt, V vocabulary.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm.cache import Cache
from llm.datatypes import TransformerInput
from llm.generation.sampling import NonFiniteLogits, Sampling, penalised, sample
from llm.init import uniform
from llm.model import LLM


class Decoder(Protocol):
    """Rows of tokens that grow, and what a model makes of them."""

    def logits(
        self, tokens: NDArray[np.int64], positions: NDArray[np.int64], images: Tensor | None = None
    ) -> Tensor:
        """Float32 logits (B, V) of the token after these, with which the rows go on; both (B, T). images: uint8 tiles
        (n, 3, S, S) that fill the slots among the tokens."""

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows alone."""


class Cached:
    """A whole model that keeps what it has made of the rows so far."""

    def __init__(self, model: LLM, longest: int | None = None) -> None:
        """longest: tokens that a row will have in the end, so that no more memory is taken."""
        self._model, self._cache = model, Cache(model.args, longest)
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


def generate(
    model: LLM | Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop_ids: Collection[int] = (),
    seed: int = 0,
    n_ids: int | None = None,
    images: Sequence[Tensor | None] | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt, at most max_new_tokens (of all rows, or of each); a stop token ends its row and is
    kept as the row's last.

    Sampling says what the settings mean; `n_ids`, `images` and errors are as of `stream`.
    """
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
    new_tokens: list[list[int]] = [[] for _ in prompts]
    made = stream(
        model, prompts, sampling, max_new_tokens=max_new_tokens, stop_ids=stop_ids, n_ids=n_ids, images=images
    )
    for row, token in made:
        new_tokens[row].append(token)
    return new_tokens


def stream(
    model: LLM | Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    max_new_tokens: int | Sequence[int],
    stop_ids: Collection[int] = (),
    n_ids: int | None = None,
    keys: Sequence[str] | None = None,
    images: Sequence[Tensor | None] | None = None,
) -> Iterator[tuple[int, int]]:
    """(row, token) of each new token as it is made, step by step.

    Args:
        max_new_tokens: for all rows, or of each.
        n_ids: ids from here on are never chosen: rows of the table that the tokenizer has no token for.
        keys: what a row's random numbers depend on beside the seed; default: its number among the prompts.
        images: of each prompt, the tiles that fill its slots, in their order: uint8 (n, 3, S, S), or floats.

    Raises ValueError for an empty prompt or a setting out of range, NonFiniteLogits (a FloatingPointError) where the
    model's logits are not finite.
    """
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    _check(prompts, limits)
    keys = [str(row) for row in range(len(prompts))] if keys is None else keys
    tiles = [of_row for of_row in images or () if of_row is not None]
    return _stream(
        model, prompts, sampling, limits, frozenset(stop_ids), n_ids, keys, torch.cat(tiles) if tiles else None
    )


def _stream(
    model: LLM | Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    limits: Sequence[int],
    stop_ids: frozenset[int],
    n_ids: int | None,
    keys: Sequence[str],
    images: Tensor | None,
) -> Iterator[tuple[int, int]]:
    tokens, positions = left_padded(prompts)
    decoder = Cached(model, tokens.shape[1] + max(limits)) if isinstance(model, LLM) else model
    active, going = list(range(len(prompts))), list(range(len(prompts)))
    seen_BV: Tensor | None = None
    for step in range(max(limits)):
        logits_BV = decoder.logits(tokens, positions, images if step == 0 else None)[:, :n_ids]
        _check_finite(logits_BV, active, step)
        if sampling.repetition_penalty != 1:
            if seen_BV is None:
                seen_BV = _seen(logits_BV, prompts)
            else:
                seen_BV = seen_BV[going].scatter_(1, torch.from_numpy(tokens).to(seen_BV.device), True)
            logits_BV = penalised(logits_BV, seen_BV, sampling.repetition_penalty)
        if sampling.temperature == 0:
            chosen = logits_BV.argmax(-1).cpu().numpy()
        else:
            draws = np.array([uniform(sampling.seed, f"generate.row{keys[i]}", step, step + 1)[0] for i in active])
            chosen = sample(logits_BV, draws, sampling.temperature, sampling.top_k, sampling.top_p)
        yield from zip(active, chosen.tolist(), strict=True)
        going = [
            i
            for i, (row, token) in enumerate(zip(active, chosen.tolist(), strict=True))
            if token not in stop_ids and step + 1 < limits[row]
        ]
        if not going:
            return
        if len(going) < len(active):
            decoder.keep(going)
            active = [active[i] for i in going]
        tokens, positions = chosen[going, None], positions[going, -1:] + 1


def _check_finite(logits_BV: Tensor, active: Sequence[int], step: int) -> None:
    finite_BV = logits_BV.isfinite()
    if not finite_BV.all():
        bad = int((~finite_BV).any(-1).int().argmax())
        raise NonFiniteLogits(active[bad], step + 1, int((~finite_BV[bad]).sum()), finite_BV.shape[-1])


def _seen(logits_BV: Tensor, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Which ids stand in each prompt, (B, V) bool."""
    seen_BV = torch.zeros_like(logits_BV, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        known = [token for token in prompt if token < logits_BV.shape[1]]
        seen_BV[row, torch.tensor(known, dtype=torch.int64, device=seen_BV.device)] = True
    return seen_BV


def left_padded(prompts: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens and positions, (B, T): prompts end together, so that the last column has every row's next-token logits."""
    longest = max(len(prompt) for prompt in prompts)
    tokens = np.zeros((len(prompts), longest), dtype=np.int64)
    positions = np.full((len(prompts), longest), -1, dtype=np.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = prompt
        positions[row, longest - len(prompt) :] = np.arange(len(prompt))
    return tokens, positions


def _check(prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> None:
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("every prompt needs at least one token; tokenizer.prompt_ids begins an empty text")
    if len(limits) != len(prompts):
        raise ValueError(f"max_new_tokens has {len(limits)} numbers for {len(prompts)} prompts")
    if min(limits) < 1:
        raise ValueError(f"max_new_tokens={min(limits)} must be at least 1")
