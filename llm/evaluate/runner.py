"""Answers to all requests of an evaluation, dealt over the replicas of a model.

Who answers what follows from the requests alone, and so does each answer; only how long it takes depends on the ranks.
"""

import heapq
import time
from collections.abc import Collection, Iterator, Sequence

from llm.evaluate.continuing import continue_
from llm.evaluate.predicting import Predictor
from llm.evaluate.requests import Answer, Continue, NonFinite, Predict, Request, Score
from llm.evaluate.scoring import Scorer
from llm.generation.pictures import Pictures
from llm.parallel.collectives import gather_json, sum_over_ranks
from llm.parallel.replica import Replica
from llm.tokenizers.base import Tokenizer

PARTS = 8
"""Into at least so many for each rank are requests cut that all have tokens in common, so that they can be dealt."""
LEAST_PART = 512
"""Tokens up to which they are not: each part computes what it has in common with the others again."""
AT_ONCE = 256
"""Answers of Continue requests that are handed on together, at most."""


class Runner:
    """Answers requests on the ranks of a replica, which is one of several where the model's ranks read other rows."""

    def __init__(
        self,
        replica: Replica,
        tokenizer: Tokenizer,
        batch_tokens: int,
        end_ids: Collection[int],
        pictures: Pictures,
    ) -> None:
        """batch_tokens: that go through the model together. end_ids: tokens that end an answer."""
        self._replica, self._tokenizer, self._batch_tokens = replica, tokenizer, batch_tokens
        self._end_ids, self._pictures = end_ids, pictures
        self._requests = self._tokens = self._filled = 0
        self._seconds = 0.0

    def answers(self, requests: Sequence[Request], done: frozenset[int]) -> Iterator[list[tuple[int, Answer]]]:
        """Answers by the requests' places, some at a time, of those of the requests that are not done and that fall to
        this replica (collective). requests: all of the evaluation, as how some are computed follows from all.

        Raises ValueError for a request that no answer can be made to, NonFinite where the model's logits are not
        finite.
        """
        started = time.perf_counter()
        for answers in self._all(requests, done):
            self._requests += len(answers)
            self._seconds += time.perf_counter() - started
            yield answers
            started = time.perf_counter()
        self._seconds += time.perf_counter() - started

    def _all(self, requests: Sequence[Request], done: frozenset[int]) -> Iterator[list[tuple[int, Answer]]]:
        scores = {i: request for i, request in enumerate(requests) if isinstance(request, Score)}
        yield from self._scores(scores, done)
        predicted = {i: r for i, r in enumerate(requests) if isinstance(r, Predict) and i not in done}
        if predicted:
            yield from self._predicted(predicted)
        yield from self._continued({i: r for i, r in enumerate(requests) if isinstance(r, Continue) and i not in done})

    def _scores(self, requests: dict[int, Score], done: frozenset[int]) -> Iterator[list[tuple[int, Answer]]]:
        scorer = Scorer(self._replica, requests, self._pictures)
        left = [i for i in requests if i not in done]
        share = scorer.cost(left) // (PARTS * self._replica.grid.rows.size)
        families = scorer.families(left, min(self._batch_tokens, max(share, LEAST_PART)))
        mine = self._mine({number: scorer.cost(family) for number, family in enumerate(families)})
        batches = scorer.batches([families[number] for number in sorted(mine)], self._batch_tokens)
        self._tokens += sum(batch.tokens for batch in batches)
        self._filled += sum(map(scorer.filled, batches))
        for answers in scorer.answers(batches, self._most(len(batches)), self._agreed):
            yield [*answers]

    def _predicted(self, requests: dict[int, Predict]) -> Iterator[list[tuple[int, Answer]]]:
        predictor = Predictor(self._replica, requests)
        share = predictor.cost(list(requests)) // (PARTS * self._replica.grid.rows.size)
        every = predictor.batches(min(self._batch_tokens, max(share, LEAST_PART)))
        mine = self._mine({number: predictor.cost(batch) for number, batch in enumerate(every)})
        batches = [every[number] for number in sorted(mine)]
        self._tokens += sum(map(predictor.cost, batches))
        self._filled += sum(map(predictor.filled, batches))
        for answers in predictor.answers(batches, self._most(len(batches))):
            yield [*answers]

    def _continued(self, requests: dict[int, Continue]) -> Iterator[list[tuple[int, Answer]]]:
        """Where ranks must make their forwards together they all make all answers, of which the first hands them on:
        how many forwards rows take that join and leave is known only once they have been made."""
        costs = {i: len(request.prompt) + request.max_new_tokens for i, request in requests.items()}
        mine = sorted(costs, key=lambda i: (-costs[i], i)) if self._in_step else self._mine(costs)
        hands_on = not self._in_step or self._replica.grid.rows.rank == 0
        made: list[tuple[int, Answer]] = []
        asked = [requests[i] for i in mine]
        try:
            for place, answer in continue_(
                self._replica, self._tokenizer, self._end_ids, asked, self._batch_tokens, self._pictures
            ):
                if hands_on:
                    made.append((mine[place], answer))
                    self._tokens += len(asked[place].prompt) + answer.tokens
                if len(made) == AT_ONCE:
                    yield made
                    made = []
        except NonFinite as error:
            # where forwards are made together, every rank makes all answers
            found = self._agreed(NonFinite(mine[error.index], str(error)))
            assert found is not None
            raise found from None
        if made:
            yield made

    def _mine(self, costs: dict[int, int]) -> list[int]:
        """Which of things with these costs fall to this replica."""
        rows = self._replica.grid.rows
        return dealt(costs, rows.size)[rows.rank]

    def _most(self, forwards: int) -> int:
        """How many forwards this rank must make, of which it needs so many itself (collective where ranks that read
        other rows must make theirs together)."""
        return max(gather_json(forwards, self._replica.world)) if self._in_step else forwards

    def _agreed(self, found: NonFinite | None) -> NonFinite | None:
        """The same on all ranks that find it together; where ranks must make their forwards together, what any of them
        has found (collective there): none may leave the others in the middle of one."""
        world = self._replica.world
        if self._in_step and sum_over_ranks([found is not None], world)[0]:
            mine = None if found is None else [found.index, str(found)]
            index, message = next(one for one in gather_json(mine, world) if one is not None)
            found = NonFinite(index, message)
        if found is not None:
            found.agreed = self._in_step or self._replica.grid.rows.size == 1
        return found

    @property
    def _in_step(self) -> bool:
        """Whether ranks that read other rows must make their forwards together with this one."""
        return self._replica.grid.expert.size > 1 or self._replica.model.gathers_weights

    def statistics(self) -> dict[str, float]:
        """Of all answers so far, over all ranks (collective)."""
        grid = self._replica.grid
        mine = [self._requests, self._tokens, self._filled, self._seconds] if grid.replica.rank == 0 else None
        rows = [row for row in gather_json(mine, grid.world) if row is not None]
        requests, tokens, filled, _ = (sum(column) for column in zip(*rows, strict=True))
        seconds = [row[3] for row in rows]
        slowest = max(seconds)
        return {
            "requests": requests,
            "tokens": tokens,
            "seconds": slowest,
            "requests_per_second": requests / slowest if slowest else 0.0,
            "tokens_per_second": tokens / slowest if slowest else 0.0,
            "padding": filled / (tokens + filled) if tokens else 0.0,
            "imbalance": slowest * len(seconds) / sum(seconds) if slowest else 1.0,
        }


def dealt(costs: dict[int, int], ranks: int) -> list[list[int]]:
    """Which of several things each of so many ranks gets: the dearest first, each to whom has least so far."""
    found: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]
    for thing in sorted(costs, key=lambda thing: (-costs[thing], thing)):
        load, rank = heapq.heappop(loads)
        found[rank].append(thing)
        heapq.heappush(loads, (load + costs[thing], rank))
    return found
