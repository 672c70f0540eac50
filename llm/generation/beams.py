"""Beam search: of several continuations of a prompt that grow side by side, the one whose whole is the likeliest.

A continuation's score is the sum of its tokens' log-probabilities over its length to the power of `length_penalty`, the
end mark counted. At each step the best (1 + number of end marks) * k of all ways to add a token to the k running ones
are looked at: those among the best k that end are finished, and the best k that do not end run on. At its length limit
the best k are finished as they are. Of the finished ones the best k are kept. A row ends once it has k of them and
either `early_stopping` says so or no running one is better by its present length. Sequences and scores are those of
`transformers` (generate with num_beams), up to the end mark.

Each prompt is computed once. A row has no more continuations than there are, so that with k at least the number of
ways no way is missed.

Shapes: B rows of prompts, N running continuations of all rows, V vocabulary, m candidates of each continuation.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from llm.decoder import Beginnings, Decoder, check_finite, left_padded, seen_ids
from llm.generation.sampling import Sampling, penalised
from llm.model import LLM


@dataclass(frozen=True)
class Beams:
    """How a search goes. ValueError, beginning with the setting's name, where one is out of range."""

    num_beams: int = 1
    """continuations that run side by side; 1 = none do, tokens are chosen one by one"""
    length_penalty: float = 1.0
    """above 1 longer continuations win more often, below 1 shorter ones; 0 = by the sum alone"""
    early_stopping: bool = False
    """end once num_beams are finished, though a running one could become better"""

    def __post_init__(self) -> None:
        if self.num_beams < 1:
            raise ValueError(f"num_beams={self.num_beams} must be at least 1")
        if not math.isfinite(self.length_penalty):
            raise ValueError(f"length_penalty={self.length_penalty} must be finite")
        for name, given in (("length_penalty", self.length_penalty != 1), ("early_stopping", self.early_stopping)):
            if given and self.num_beams == 1:
                value = str(getattr(self, name)).lower()
                raise ValueError(f"{name}={value} needs num_beams above 1; of one continuation there is no choice")

    def check(self, sampling: Sampling) -> None:
        """ValueError where tokens are both searched for and drawn."""
        if self.num_beams > 1 and sampling.temperature > 0:
            raise ValueError(
                f"num_beams={self.num_beams} does not go with temperature={sampling.temperature}: a search draws "
                f"nothing; leave one of them out"
            )


@dataclass(frozen=True)
class Hypothesis:
    """A continuation of a prompt."""

    tokens: list[int]
    score: float


Ended = Callable[[int, Sequence[int]], bool]
"""(row, tokens)"""


@dataclass(frozen=True)
class _Ends:
    """Where continuations end, and how many there are."""

    beams: Beams
    stop_ids: frozenset[int]
    ended: Ended | None

    def with_token(self, row: int, tokens: list[int]) -> bool:
        """Whether a continuation ends with its last token."""
        return tokens[-1] in self.stop_ids or (self.ended is not None and self.ended(row, tokens))


@dataclass
class _Row:
    """The search of one prompt."""

    number: int
    """of the prompt"""
    limit: int
    running: list[Hypothesis] = field(default_factory=lambda: [Hypothesis([], 0.0)])
    """best first; a score is the sum of log-probabilities"""
    finished: list[Hypothesis] = field(default_factory=list)
    """best first"""


def beam_search(
    model: LLM | Decoder,
    prompts: Sequence[Sequence[int]],
    beams: Beams,
    *,
    max_new_tokens: int | Sequence[int],
    stop_ids: Collection[int] = (),
    n_ids: int | None = None,
    images: Sequence[Tensor | None] | None = None,
    sources: Sequence[Sequence[int]] | None = None,
    repetition_penalty: float = 1.0,
    ended: Ended | None = None,
) -> list[list[Hypothesis]]:
    """The best continuations of each prompt, best first: at most beams.num_beams. Arguments and errors are as of
    llm.generate.stream; probabilities are among the ids below n_ids. ended: whether a continuation of a row ends with
    its newest token, though that is no stop token."""
    found: dict[int, list[Hypothesis]] = dict(
        beam_stream(
            model,
            prompts,
            beams,
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids,
            n_ids=n_ids,
            images=images,
            sources=sources,
            repetition_penalty=repetition_penalty,
            ended=ended,
        )
    )
    return [found[row] for row in range(len(prompts))]


def beam_stream(
    model: LLM | Decoder,
    prompts: Sequence[Sequence[int]],
    beams: Beams,
    *,
    max_new_tokens: int | Sequence[int],
    stop_ids: Collection[int] = (),
    n_ids: int | None = None,
    images: Sequence[Tensor | None] | None = None,
    sources: Sequence[Sequence[int]] | None = None,
    repetition_penalty: float = 1.0,
    ended: Ended | None = None,
) -> Iterator[tuple[int, list[Hypothesis]]]:
    """(row, what `beam_search` gives of it) of each prompt once its search has ended."""
    beginnings = Beginnings.of(prompts, max_new_tokens, images, sources)
    ends = _Ends(beams, frozenset(stop_ids), ended)
    return _search(beginnings.decoder(model), beginnings, ends, n_ids, repetition_penalty)


@torch.no_grad()
def _search(
    decoder: Decoder, beginnings: Beginnings, ends: "_Ends", n_ids: int | None, penalty: float
) -> Iterator[tuple[int, list[Hypothesis]]]:
    prompts, limits = beginnings.prompts, beginnings.limits
    tokens, positions = left_padded(prompts)
    rows = [_Row(number, limit) for number, limit in enumerate(limits)]
    looked_at = (1 + max(1, len(ends.stop_ids))) * ends.beams.num_beams
    seen_NV: Tensor | None = None
    for step in range(max(limits)):
        made_NV = decoder.logits(tokens, positions) if step else beginnings.logits(decoder, tokens, positions)
        logits_NV = made_NV[:, :n_ids]
        check_finite(logits_NV, [row.number for row in rows for _ in row.running], step)
        log_p_NV = logits_NV.float().log_softmax(-1)
        if penalty != 1:
            if seen_NV is None:
                seen_NV = seen_ids(log_p_NV, prompts)
            else:
                seen_NV.scatter_(1, torch.from_numpy(tokens).to(seen_NV.device), True)
            log_p_NV = penalised(log_p_NV, seen_NV, penalty)
        best_Nm = log_p_NV.topk(min(looked_at, log_p_NV.shape[1]))
        parents = _advance(rows, best_Nm.values.cpu(), best_Nm.indices.cpu(), ends, looked_at)
        yield from ((row.number, row.finished) for row in rows if not row.running)
        rows = [row for row in rows if row.running]
        if not rows:
            return
        if parents != list(range(len(log_p_NV))):
            decoder.keep(parents)
            seen_NV = None if seen_NV is None else seen_NV[parents]
        tokens = np.array([[hypothesis.tokens[-1]] for row in rows for hypothesis in row.running])
        positions = np.array([[len(prompts[row.number]) + step] for row in rows for _ in row.running])


def _advance(
    rows: Sequence[_Row],
    log_p_Nm: Tensor,
    ids_Nm: Tensor,
    ends: "_Ends",
    looked_at: int,
) -> list[int]:
    """Take the best tokens of each continuation into the rows, of which those that have ended run none any more. Which
    of the N each of the now running ones goes on from."""
    beams, parents, first = ends.beams, [], 0
    for row in rows:
        here = slice(first, first + len(row.running))
        # sums as float32, and the first of equals first: as a search over one tensor of them all has it
        sums = torch.tensor([hypothesis.score for hypothesis in row.running])[:, None] + log_p_Nm[here]
        ids, m = ids_Nm[here].flatten().tolist(), log_p_Nm.shape[1]
        order = sums.flatten().sort(descending=True, stable=True)
        length = len(row.running[0].tokens) + 1
        running: list[tuple[int, Hypothesis]] = []
        for rank, (place, total) in enumerate(
            zip(order.indices[:looked_at].tolist(), order.values[:looked_at].tolist(), strict=True)
        ):
            parent, token = place // m, ids[place]
            grown = Hypothesis([*row.running[parent].tokens, token], total)
            if length < row.limit and not ends.with_token(row.number, grown.tokens):
                if len(running) < beams.num_beams:
                    running.append((first + parent, grown))
            elif rank < beams.num_beams:
                row.finished.append(Hypothesis(grown.tokens, total / length**beams.length_penalty))
        row.finished = sorted(row.finished, key=lambda one: -one.score)[: beams.num_beams]
        first = here.stop
        if len(row.finished) == beams.num_beams and running:
            best = running[0][1].score / length**beams.length_penalty
            if beams.early_stopping or best <= row.finished[-1].score:
                running = []
        row.running = [hypothesis for _, hypothesis in running]
        parents += [parent for parent, _ in running]
    return parents
