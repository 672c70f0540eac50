"""Continuing prompts through the cache: greedy, sampled or by beam search; prompts of any lengths, each row on its own.

A row's tokens depend on its prompt, its seed and the settings, never on the other rows: padding is invisible, and the
random numbers of a row are a function of (seed, the row's key, step).

Shapes: B rows, T longest prompt, V vocabulary.
"""

from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from llm.decoder import Beginnings, Decoder, check_finite, left_padded, seen_ids
from llm.generation.beams import Beams, beam_search
from llm.generation.sampling import Sampling, penalised, sample
from llm.init import uniform
from llm.model import LLM


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
    num_beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool = False,
    sources: Sequence[Sequence[int]] | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt, at most max_new_tokens (of all rows, or of each); a stop token ends its row and is
    kept as the row's last.

    Sampling and Beams say what the settings mean; `n_ids`, `images`, `sources` and errors are as of `stream`.
    """
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
    beams = Beams(num_beams, length_penalty, early_stopping)
    beams.check(sampling)
    if num_beams > 1:
        found = beam_search(
            model, prompts, beams, max_new_tokens=max_new_tokens, stop_ids=stop_ids, n_ids=n_ids, images=images,
            sources=sources, repetition_penalty=repetition_penalty,
        )  # fmt: skip
        return [best.tokens for best, *_ in found]
    new_tokens: list[list[int]] = [[] for _ in prompts]
    made = stream(
        model, prompts, sampling, max_new_tokens=max_new_tokens, stop_ids=stop_ids, n_ids=n_ids, images=images,
        sources=sources,
    )  # fmt: skip
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
    sources: Sequence[Sequence[int]] | None = None,
    ended: Callable[[int], bool] = lambda row: False,
) -> Iterator[tuple[int, int]]:
    """(row, token) of each new token as it is made, step by step.

    Args:
        max_new_tokens: for all rows, or of each.
        n_ids: ids from here on are never chosen: rows of the table that the tokenizer has no token for.
        keys: what a row's random numbers depend on beside the seed; default: its number among the prompts.
        images: of each prompt, the tiles that fill its slots, in their order: uint8 (n, 3, S, S), or floats.
        sources: of each prompt, what the encoder of an encoder-decoder reads; a prompt is then what the answer begins
            with, tokenizer.bos_id.
        ended: whether a row has ended with the tokens that were taken of it, asked before each further step.

    Raises ValueError for an empty prompt or a setting out of range, NonFiniteLogits (a FloatingPointError) where the
    model's logits are not finite.
    """
    beginnings = Beginnings.of(prompts, max_new_tokens, images, sources)
    keys = [str(row) for row in range(len(prompts))] if keys is None else keys
    return _stream(beginnings.decoder(model), beginnings, sampling, frozenset(stop_ids), n_ids, keys, ended)


def _stream(
    decoder: Decoder,
    beginnings: Beginnings,
    sampling: Sampling,
    stop_ids: frozenset[int],
    n_ids: int | None,
    keys: Sequence[str],
    ended: Callable[[int], bool],
) -> Iterator[tuple[int, int]]:
    prompts, limits = beginnings.prompts, beginnings.limits
    tokens, positions = left_padded(prompts)
    active, going = list(range(len(prompts))), list(range(len(prompts)))
    seen_BV: Tensor | None = None
    for step in range(max(limits)):
        made_BV = decoder.logits(tokens, positions) if step else beginnings.logits(decoder, tokens, positions)
        logits_BV = made_BV[:, :n_ids]
        check_finite(logits_BV, active, step)
        if sampling.repetition_penalty != 1:
            if seen_BV is None:
                seen_BV = seen_ids(logits_BV, prompts)
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
            if token not in stop_ids and step + 1 < limits[row] and not ended(row)
        ]
        if not going:
            return
        if len(going) < len(active):
            decoder.keep(going)
            active = [active[i] for i in going]
        tokens, positions = chosen[going, None], positions[going, -1:] + 1
