"""Answers to Score requests: the tokens of a batch in one row, each request a document of it, so nothing is padded.

An answer is a function of its request: documents do not see each other, and the kernels of a token's row do not depend
on how many rows there are once these are not few and come to a multiple of ALIGNED.

Shapes: N tokens of a batch, n targets, D model width.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from llm.datatypes import TransformerInput
from llm.evaluate.head import target_scores
from llm.evaluate.requests import NonFinite, Score, Scored
from llm.generation.pictures import Pictures
from llm.generation.text import context_length
from llm.parallel.replica import EVALUATED_AT_ONCE, Replica

ALIGNED = 32
"""Tokens of a batch come to a multiple of it: torch works through a tensor by vectors, and what is left at its end by
single numbers with other bits. With another multiple, or none, answers of a model with experts depended on their
neighbours (measured on AVX-512)."""
FILLED = 3
"""At least so many tokens at the end of a batch are nobody's: two documents of unequal length, so that attention is
never that of equal ones, which takes other shapes."""


@dataclass(frozen=True)
class ScoreBatch:
    """Requests that go through the model together."""

    indices: tuple[int, ...]
    """of the requests"""
    tokens: int
    """theirs"""


def score(
    replica: Replica, requests: Sequence[Score], batch_tokens: int, pictures: Pictures
) -> Iterator[tuple[int, Scored]]:
    """(index, answer) of each request as it is done; on all ranks of the replica alike (collective).

    batch_tokens: of a batch; one request may have more. Raises ValueError for a request that no answer can be made to,
    NonFinite where the model's logits are not finite, UserError where an image is no longer what it was.
    """
    scorer = Scorer(replica, dict(enumerate(requests)), pictures)
    for answers in scorer.answers(scorer.batches(range(len(requests)), batch_tokens)):
        yield from answers


class Scorer:
    """All Score requests of an evaluation, some of which this replica answers."""

    def __init__(self, replica: Replica, requests: dict[int, Score], pictures: Pictures) -> None:
        """requests: by their numbers among all requests. ValueError for one that no answer can be made to."""
        self._replica, self._requests, self._pictures = replica, requests, pictures
        context, vocab_size = context_length(replica.model.args), replica.model.args.vocab_size
        for index, request in requests.items():
            _check(request, index, context, vocab_size)
        vision = replica.model.args.vision
        slots = () if vision is None else (vision.patch_token_id, vision.video_token_id)
        self._filler = next(token for token in range(3) if token not in slots)

    def cost(self, index: int) -> int:
        """Tokens that a request's answer takes."""
        request = self._requests[index]
        return len(request.context) + len(request.target) - 1

    def batches(self, wanted: Sequence[int], batch_tokens: int) -> list[ScoreBatch]:
        """Batches of the wanted requests, the longest first."""
        found: list[ScoreBatch] = []
        taken: list[int] = []
        tokens = 0
        for index in sorted(wanted, key=lambda index: (-self.cost(index), index)):
            if taken and tokens + self.cost(index) > batch_tokens:
                found.append(ScoreBatch(tuple(taken), tokens))
                taken, tokens = [], 0
            taken.append(index)
            tokens += self.cost(index)
        return [*found, ScoreBatch(tuple(taken), tokens)] if taken else found

    @staticmethod
    def filled(batch: ScoreBatch) -> int:
        """Tokens of a batch that are nobody's."""
        return FILLED + -(batch.tokens + FILLED) % ALIGNED

    def answers(self, batches: Sequence[ScoreBatch], forwards: int = 0) -> Iterator[list[tuple[int, Scored]]]:
        """Those of one batch after the other (collective). forwards: so many at least, where other ranks make so many
        with this one."""
        idle = [ScoreBatch((), 0)] * (forwards - len(batches))
        ranks = self._replica.grid.pipeline.size
        every, at_once = [*batches, *idle], EVALUATED_AT_ONCE * ranks if ranks > 1 else 1
        for first in range(0, len(every), at_once):
            chunk = every[first : first + at_once]
            hidden = self._replica.hidden([self._inputs(batch) for batch in chunk])
            for number, batch in enumerate(chunk):
                if batch.indices:
                    yield self._scored(batch, hidden[number] if hidden else None)

    def _inputs(self, batch: ScoreBatch) -> TransformerInput:
        asked = [self._requests[index] for index in batch.indices]
        documents = [[*request.context, *request.target][:-1] for request in asked]
        documents += [[self._filler], [self._filler] * (self.filled(batch) - 1)]
        ends = torch.tensor([0, *accumulate(map(len, documents))])
        tiles = None
        if self._replica.stages[0].first:
            tiles = self._pictures.tiles([picture for request in asked for picture in request.pictures])
        device = self._replica.world.device
        tokens = torch.tensor([token for document in documents for token in document], device=device)[None]
        return TransformerInput(tokens, cu_seqlens=ends, images=None if tiles is None else tiles.to(device))

    def _scored(self, batch: ScoreBatch, hidden_1ND: Tensor | None) -> list[tuple[int, Scored]]:
        asked = [self._requests[index] for index in batch.indices]
        lengths = [len(request.target) for request in asked]
        made = None
        if hidden_1ND is not None:
            places: list[int] = []
            first = 0
            for request in asked:
                last = first + len(request.context) - 1  # of the context: it predicts the target's first
                first = last + len(request.target)
                places += range(last, first)
            device = hidden_1ND.device
            targets = torch.tensor([token for request in asked for token in request.target], device=device)
            hidden = hidden_1ND[0].index_select(0, torch.tensor(places, device=device))
            made = torch.stack([x.double() for x in target_scores(self._replica.model, hidden, targets)])
        rows = self._replica.from_last_stage(made, (3, sum(lengths)), torch.float64).cpu()
        answers = []
        for index, row in zip(batch.indices, rows.split(lengths, dim=1), strict=True):
            logprobs, greedy, finite = row.tolist()
            if not all(finite):
                place = finite.index(0.0) + 1
                raise NonFinite(index, f"the logits of token {place} of {len(finite)} that are scored are not finite")
            answers.append((index, Scored(math.fsum(logprobs), all(greedy))))
        return answers


def _check(request: Score, index: int, context: int, vocab_size: int) -> None:
    ids = (*request.context, *request.target)
    if not request.context or not request.target:
        raise ValueError(f"request {index}: context and target need at least one token each")
    if len(ids) - 1 > context:
        raise ValueError(f"request {index}: its {len(ids)} tokens but the last are more than the context of {context}")
    if not 0 <= min(ids) <= max(ids) < vocab_size:
        raise ValueError(f"request {index}: token ids must lie between 0 and {vocab_size - 1}")
