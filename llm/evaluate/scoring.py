"""Answers to Score requests: the tokens of a batch in one row, each piece of a request a document of it. So nothing is
padded, and what requests have in common is computed once.

An answer is a function of its request and of what all requests of the evaluation have in common with it: documents see
only what they go on from, and the kernels of a token's row do not depend on how many rows there are once these are not
few and come to a multiple of ALIGNED.

Shapes: N tokens of a batch, n targets, D model width.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from llm.args import ModelArgs
from llm.datatypes import TransformerInput
from llm.evaluate.head import target_scores
from llm.evaluate.requests import NonFinite, Score, Scored
from llm.evaluate.sharing import Forest, Tokens
from llm.generation.pictures import Picture, Pictures
from llm.generation.text import context_length
from llm.parallel.replica import EVALUATED_AT_ONCE, Replica

ALIGNED = 32
"""Tokens of a batch come to a multiple of it: torch works through a tensor by vectors, and what is left at its end by
single numbers with other bits. With another multiple, or none, answers of a model with experts depended on their
neighbours (measured on AVX-512)."""
FILLED = 6
"""At least so many tokens of a batch are nobody's: at its begin documents of one token and of two, so that attention is
never that of equal ones, which takes other shapes; and some at its end, as ALIGNED says."""


@dataclass(frozen=True)
class ScoreBatch:
    """Requests that go through the model together."""

    indices: tuple[int, ...]
    """of the requests"""
    pieces: tuple[int, ...]
    """of their tokens; those that begin sequences come first, and each after the one that it goes on from"""
    tokens: int
    """of the pieces"""


def score(
    replica: Replica, requests: Sequence[Score], batch_tokens: int, pictures: Pictures
) -> Iterator[tuple[int, Scored]]:
    """(index, answer) of each request as it is done; on all ranks of the replica alike (collective).

    batch_tokens: of a batch; one request may have more. Raises ValueError for a request that no answer can be made to,
    NonFinite where the model's logits are not finite, UserError where an image is no longer what it was.
    """
    scorer = Scorer(replica, dict(enumerate(requests)), pictures)
    for answers in scorer.answers(scorer.batches(scorer.families(range(len(requests)), batch_tokens), batch_tokens)):
        yield from answers


class Scorer:
    """All Score requests of an evaluation, some of which this replica answers."""

    def __init__(self, replica: Replica, requests: dict[int, Score], pictures: Pictures) -> None:
        """requests: by their numbers among all requests. ValueError for one that no answer can be made to."""
        self._replica, self._requests, self._pictures = replica, requests, pictures
        args = replica.model.args
        for index, request in requests.items():
            _check(request, index, context_length(args), args.vocab_size)
        vision = args.vision
        slots = () if vision is None else (vision.patch_token_id, vision.video_token_id)
        self._filler = next(token for token in range(3) if token not in slots)
        self._numbers = {index: number for number, index in enumerate(requests)}
        self._indices = list(requests)
        self._forest = Forest([_tokens(request, slots) for request in requests.values()], share=_shares(args))

    def families(self, wanted: Sequence[int], limit: int) -> list[list[int]]:
        """The wanted requests, those together that have tokens in common, in parts of no more than `limit` tokens but
        for single requests; the longest first."""
        by_root: dict[int, list[int]] = {}
        for index in wanted:
            by_root.setdefault(self._path(index)[0], []).append(index)
        found = []
        for indices in by_root.values():
            indices.sort(key=lambda index: (self._path(index), index))  # those with most in common are neighbours
            part: list[int] = []
            pieces: set[int] = set()
            tokens = 0
            for index in indices:
                new = set(self._path(index)) - pieces
                if part and tokens + self._count(new) > limit:
                    found.append(part)
                    part, pieces, tokens, new = [], set(), 0, set(self._path(index))
                part.append(index)
                pieces |= new
                tokens += self._count(new)
            found.append(part)
        return sorted(found, key=lambda family: (-max(map(self._length, family)), family))

    def cost(self, indices: Sequence[int]) -> int:
        """Tokens that are computed for these requests together."""
        return self._count({piece for index in indices for piece in self._path(index)})

    def batches(self, families: Sequence[Sequence[int]], batch_tokens: int) -> list[ScoreBatch]:
        """Batches of whole families, in their order."""
        found: list[ScoreBatch] = []
        taken: list[int] = []
        tokens = 0
        for family in families:
            cost = self.cost(family)
            if taken and tokens + cost > batch_tokens:
                found.append(self._batch(taken))
                taken, tokens = [], 0
            taken += family
            tokens += cost
        return [*found, self._batch(taken)] if taken else found

    @staticmethod
    def filled(batch: ScoreBatch) -> int:
        """Tokens of a batch that are nobody's."""
        return FILLED + -(batch.tokens + FILLED) % ALIGNED

    def answers(
        self,
        batches: Sequence[ScoreBatch],
        forwards: int = 0,
        agreed: Callable[[NonFinite | None], NonFinite | None] = lambda found: found,
    ) -> Iterator[list[tuple[int, Scored]]]:
        """Those of one batch after the other (collective). forwards: so many at least, where other ranks make so many
        with this one. agreed: what of these has been met on any of them, which is then raised on all."""
        idle = [ScoreBatch((), (), 0)] * (forwards - len(batches))
        ranks = self._replica.grid.pipeline.size
        every, at_once = [*batches, *idle], EVALUATED_AT_ONCE * ranks if ranks > 1 else 1
        for first in range(0, len(every), at_once):
            chunk = every[first : first + at_once]
            hidden = self._replica.hidden([self._inputs(batch) for batch in chunk])
            found, failure = [], None
            try:
                for number, batch in enumerate(chunk):
                    if batch.indices:
                        found.append(self._scored(batch, hidden[number] if hidden else None))
            except NonFinite as error:
                failure = error
            if (failure := agreed(failure)) is not None:
                raise failure
            yield from found

    def _path(self, index: int) -> list[int]:
        return self._forest.path(self._numbers[index])

    def _length(self, index: int) -> int:
        return len(self._requests[index].context) + len(self._requests[index].target) - 1

    def _len(self, piece: int) -> int:
        return len(self._forest.pieces[piece])

    def _count(self, pieces: set[int]) -> int:
        return sum(map(self._len, pieces))

    def _batch(self, indices: Sequence[int]) -> ScoreBatch:
        pieces = list(dict.fromkeys(piece for index in indices for piece in self._path(index)))
        # stable: parents stay before the others; equal lengths lie together, and are not moved for attention
        pieces.sort(key=lambda piece: (1, 0) if self._forest.pieces[piece].parent >= 0 else (0, self._len(piece)))
        return ScoreBatch(tuple(indices), tuple(pieces), self._count(set(pieces)))

    def _inputs(self, batch: ScoreBatch) -> TransformerInput:
        filler = self._filler
        documents: list[tuple[int, ...]] = [(filler,), (filler,) * 2]
        parents = [-1, -1]
        numbers = {}
        pictures: list[Picture] = []
        for piece in batch.pieces:
            stands = self._forest.pieces[piece]
            request = self._requests[self._indices[stands.owner]]
            numbers[piece] = len(documents)
            documents.append((*request.context, *request.target)[stands.start : stands.end])
            parents.append(numbers[stands.parent] if stands.parent >= 0 else -1)
            pictures += request.pictures if stands.start == 0 else ()
        documents.append((filler,) * (self.filled(batch) - 3))
        parents.append(-1)
        first = self._replica.stages[0].first
        tiles = self._pictures.tiles(pictures) if first else None
        device = self._replica.world.device
        return TransformerInput(
            torch.tensor([token for document in documents for token in document], device=device)[None],
            cu_seqlens=torch.tensor([0, *accumulate(map(len, documents))]),
            images=None if tiles is None else tiles.to(device),
            parents=torch.tensor(parents) if max(parents) >= 0 else None,
        )

    def _scored(self, batch: ScoreBatch, hidden_1ND: Tensor | None) -> list[tuple[int, Scored]]:
        asked = [self._requests[index] for index in batch.indices]
        lengths = [len(request.target) for request in asked]
        made = None
        if hidden_1ND is not None:
            device = hidden_1ND.device
            targets = torch.tensor([token for request in asked for token in request.target], device=device)
            hidden = hidden_1ND[0].index_select(0, torch.tensor(self._places(batch), device=device))
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

    def _places(self, batch: ScoreBatch) -> list[int]:
        """Where in the row of a batch the tokens stand that come before targets."""
        starts = {}
        at = 3
        for piece in batch.pieces:
            starts[piece] = at - self._forest.pieces[piece].start
            at += len(self._forest.pieces[piece])
        found: list[int] = []
        for index in batch.indices:
            first = len(self._requests[index].context) - 1
            for piece in self._path(index):
                stands = self._forest.pieces[piece]
                found += range(starts[piece] + max(first, stands.start), starts[piece] + stands.end)
        return found


def _check(request: Score, index: int, context: int, vocab_size: int) -> None:
    ids = (*request.context, *request.target)
    if not request.context or not request.target:
        raise ValueError(f"request {index}: context and target need at least one token each")
    if len(ids) - 1 > context:
        raise ValueError(f"request {index}: its {len(ids)} tokens but the last are more than the context of {context}")
    if not 0 <= min(ids) <= max(ids) < vocab_size:
        raise ValueError(f"request {index}: token ids must lie between 0 and {vocab_size - 1}")


def _tokens(request: Score, slots: Sequence[int | None]) -> Tokens:
    ids = (*request.context, *request.target)[:-1]
    if not request.pictures:
        return Tokens(ids)
    last = max((place for place, token in enumerate(ids) if token in slots), default=-1)
    return Tokens(ids, " ".join(picture.digest for picture in request.pictures), last + 1)


def _shares(args: ModelArgs) -> bool:
    """Whether a model's tokens can go on from others of the same batch: if nothing but attention looks back, and RoPE
    does not turn by the length of a whole sequence."""
    dynamic = args.rope_scaling is not None and args.rope_scaling.kind == "dynamic"
    return not dynamic and not any(spec.stateful for spec in args.layer_specs())
