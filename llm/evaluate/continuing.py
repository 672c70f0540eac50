"""Answers to Continue requests: rows that decode together, each as if it were alone.

The longest prompts come first; one that several go on from is computed once. An answer is a function of its request:
its tokens are those of its own prompt, and its draws are numbered by the seed, the prompt and which of several answers
it is. So what runs beside it, in which order, on how many ranks, decides only how fast it goes. Searches (num_beams)
run by themselves, before the others: llm/evaluate/searching.py.

Shapes: B rows, T longest prompt, V vocabulary.
"""

import hashlib
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm.args import ModelArgs
from llm.evaluate.endings import AnswerText
from llm.evaluate.requests import Continue, Continued, NonFinite
from llm.evaluate.running import Beginning, Rows, open_rows
from llm.evaluate.searching import search
from llm.generation.pictures import Pictures
from llm.generation.sampling import penalised, sample
from llm.generation.text import FinishReason, context_length
from llm.init import uniform
from llm.parallel.replica import Replica
from llm.tokenizers.base import Tokenizer

MOST_ROWS = 128
"""That decode together: beyond it a step takes as much longer as it has more rows."""
JOIN_AT_ONCE = 8
"""Rows join where they then are one of so many, or the last."""
DRAWS = 64
"""Random numbers of a row that are made at a time."""

Ints = NDArray[np.int64]


def continue_(
    replica: Replica,
    tokenizer: Tokenizer,
    end_ids: Collection[int],
    requests: Sequence[Continue],
    batch_tokens: int,
    pictures: Pictures,
) -> Iterator[tuple[int, Continued]]:
    """(index, answer) of each request as it is done; on all ranks of the replica alike, and where a forward needs ranks
    of others (expert parallelism, ZeRO-3), on those too (collective).

    Args:
        end_ids: tokens that end an answer.
        batch_tokens: of the rows that decode together, prompts and most new tokens; one row may have more.

    Raises ValueError for a request that no answer can be made to, NonFinite where the model's logits are not finite,
    UserError where an image is no longer what it was.
    """
    args = replica.model.args
    for index, request in enumerate(requests):
        _check(request, index, args)
    searched = [one for one in enumerate(requests) if one[1].beams.num_beams > 1]
    yield from search(replica, tokenizer, end_ids, searched, batch_tokens, pictures)
    n_ids = min(tokenizer.vocab_size, args.vocab_size)
    batch = _Batch(open_rows(replica), n_ids, frozenset(end_ids), pictures)
    first: dict[tuple[object, ...], int] = {}  # of the requests that begin alike
    for index, request in enumerate(requests):
        first.setdefault(_beginning(request), index)
    order = sorted(
        (index for index, request in enumerate(requests) if request.beams.num_beams == 1),
        key=lambda index: (-requests[index].n_tokens, first[_beginning(requests[index])], index),
    )
    waiting = deque(_Row.of(index, requests[index], tokenizer, args) for index in order)
    while waiting or batch.rows:
        joining = _joining(waiting, batch, batch_tokens)
        yield from batch.join(joining) if joining else batch.step()


def _joining(waiting: deque["_Row"], batch: "_Batch", batch_tokens: int) -> list["_Row"]:
    """Rows to take in before the next step, taken from those waiting. Each time costs a forward, so not until some
    find room at once."""
    there = len(batch.rows)
    if there and not batch.takes_more:
        return []
    width = max((row.width for row in batch.rows), default=0)
    count = 0
    for row in waiting:
        width = max(width, row.width + len(row.request.source))
        n_rows = there + count + 1
        if n_rows > MOST_ROWS or (n_rows > 1 and n_rows * width > batch_tokens):
            break
        count += 1
    if there and count < len(waiting) and count * JOIN_AT_ONCE < there + count:
        return []
    return [waiting.popleft() for _ in range(count)]


def _beginning(request: Continue) -> tuple[object, ...]:
    """The same of requests that go on from the same."""
    return request.prompt, request.source, tuple(picture.digest for picture in request.pictures)


def _check(request: Continue, index: int, args: ModelArgs) -> None:
    name, length = f"request {index}", len(request.prompt)
    context, vocab_size = context_length(args), args.vocab_size
    if not request.prompt:
        raise ValueError(f"{name}: a prompt needs at least one token")
    if length >= context:
        raise ValueError(f"{name}: its prompt of {length} tokens leaves no room in the context of {context}")
    if not 0 <= min(request.prompt) <= max(request.prompt) < vocab_size:
        raise ValueError(f"{name}: token ids must lie between 0 and {vocab_size - 1}")
    if bool(request.source) != (args.encoder_layers > 0):
        raise ValueError(f"{name}: a source is of an encoder-decoder, and of no other model")
    if len(request.source) > context or not all(0 <= token < vocab_size for token in request.source):
        raise ValueError(f"{name}: its source is longer than the context of {context}, or has other ids than the model")
    if request.max_new_tokens < 1:
        raise ValueError(f"{name}: max_new_tokens={request.max_new_tokens} must be at least 1")
    if "" in request.stop:
        raise ValueError(f"{name}: a stop text is empty")
    try:
        request.beams.check(request.sampling)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


@dataclass
class _Row:
    """A request on its way."""

    index: int
    request: Continue
    limit: int
    """most new tokens"""
    text: AnswerText
    key: str
    """what its random numbers depend on beside the seed"""
    width: int
    """tokens that it has in the end, unless it ends before"""
    n_tokens: int = 0
    draws: list[float] = field(default_factory=list)
    seen: NDArray[np.bool_] | None = None
    """which ids stand in it, where that changes what comes next"""

    @classmethod
    def of(cls, index: int, request: Continue, tokenizer: Tokenizer, args: ModelArgs) -> "_Row":
        said = hashlib.blake2b(np.array(request.prompt, dtype="<i8").tobytes(), digest_size=16)
        for picture in request.pictures:
            said.update(picture.digest.encode())
        if request.source:
            said.update(np.array(request.source, dtype="<i8").tobytes())
        key = f"evaluate.prompt{said.hexdigest()}.sample{request.sample}"
        context = context_length(args)
        limit = min(request.max_new_tokens, context - len(request.prompt))
        text = AnswerText(tokenizer, request.prompt, request.stop)
        row = cls(index, request, limit, text, key, len(request.prompt) + limit)
        if request.sampling.repetition_penalty != 1:
            row.seen = np.zeros(args.vocab_size, dtype=bool)
            row.seen[list(request.prompt)] = True
        return row

    def draw(self) -> float:
        """The random number of its next token."""
        if self.n_tokens >= len(self.draws):
            numbers = uniform(self.request.sampling.seed, self.key, self.n_tokens, self.n_tokens + DRAWS)
            self.draws.extend(numbers.tolist())
        return self.draws[self.n_tokens]

    def push(self, token: int, end_ids: frozenset[int]) -> FinishReason | None:
        """Add a token; why the answer ends with it."""
        self.n_tokens += 1
        if self.seen is not None:
            self.seen[token] = True
        if token in end_ids:
            return "stop"
        self.text.push(token)
        if self.text.stopped:
            return "stop"
        if self.n_tokens == self.limit:
            return "length" if self.limit == self.request.max_new_tokens else "context"
        return None

    def answer(self, reason: FinishReason) -> Continued:
        """Once it has ended."""
        text = self.text.end()
        return Continued(text, self.n_tokens, "stop" if self.text.stopped else reason)


class _Batch:
    """The rows that run together."""

    def __init__(self, model: Rows, n_ids: int, end_ids: frozenset[int], pictures: Pictures) -> None:
        """n_ids: ids from here on are never chosen."""
        self._model, self._n_ids, self._end_ids, self._pictures = model, n_ids, end_ids, pictures
        self._newest: Ints = np.zeros(0, dtype=np.int64)  # token of each row
        self.rows: list[_Row] = []

    @property
    def takes_more(self) -> bool:
        """Whether rows can join while others run."""
        return self._model.joins

    def join(self, rows: list[_Row]) -> list[tuple[int, Continued]]:
        """Take in rows with their first new tokens; the answers of those that end with them."""
        beginnings = []
        for _, alike in groupby(rows, lambda row: _beginning(row.request)):
            first, *others = (row.request for row in alike)
            tiles = self._pictures.tiles(first.pictures)
            beginnings.append(Beginning(first.prompt, tiles, 1 + len(others), first.source))
        there, newest = self.rows, self._newest
        width = max(row.width for row in [*there, *rows])
        logits_BV = self._model.join(beginnings, width)
        self.rows = [*there, *rows]
        return self._push(len(there), np.concatenate([newest, self._chosen(logits_BV, rows)]))

    def step(self) -> list[tuple[int, Continued]]:
        """Add a token to each row; the answers of those that end with it."""
        positions = np.array([row.width - row.limit + row.n_tokens - 1 for row in self.rows])
        return self._push(0, self._chosen(self._model.step(self._newest, positions), self.rows))

    def _push(self, first: int, newest: Ints) -> list[tuple[int, Continued]]:
        """Give each row from `first` on its token."""
        going, answers = list(range(first)), []
        for place in range(first, len(self.rows)):
            row = self.rows[place]
            reason = row.push(int(newest[place]), self._end_ids)
            if reason is None:
                going.append(place)
            else:
                answers.append((row.index, row.answer(reason)))
        if answers:
            self._model.keep(going)
        self.rows, self._newest = [self.rows[place] for place in going], newest[going]
        return answers

    def _chosen(self, logits_BV: Tensor, rows: Sequence[_Row]) -> Ints:
        logits_BV = logits_BV[:, : self._n_ids]
        if not logits_BV.sum().isfinite():  # by a sum, as looking at each takes longer than choosing one
            _check_finite(logits_BV, rows)
        return choose(logits_BV, rows)


def _check_finite(logits_BV: Tensor, rows: Sequence[_Row]) -> None:
    finite_BV = logits_BV.isfinite()
    if not finite_BV.all():
        bad = int((~finite_BV).any(-1).int().argmax())
        count, of = int((~finite_BV[bad]).sum()), finite_BV.shape[-1]
        number = rows[bad].n_tokens + 1
        raise NonFinite(rows[bad].index, f"at new token {number}, {count} of {of} logits are not finite")


def choose(logits_BV: Tensor, rows: Sequence[_Row]) -> Ints:
    """The next token of each row by its own settings, (B,)."""
    seen_of = {place: row.seen for place, row in enumerate(rows) if row.seen is not None}
    if seen_of:
        logits_BV = logits_BV.clone()
    for place, seen in seen_of.items():
        seen_V = torch.from_numpy(seen[: logits_BV.shape[1]]).to(logits_BV.device)
        logits_BV[place] = penalised(logits_BV[place], seen_V, rows[place].request.sampling.repetition_penalty)
    chosen = likeliest(logits_BV)
    alike: dict[tuple[float, int | None, float | None], list[int]] = {}
    for place, row in enumerate(rows):
        setting = row.request.sampling
        if setting.temperature > 0:
            alike.setdefault((setting.temperature, setting.top_k, setting.top_p), []).append(place)
    for settings, places in alike.items():
        chosen[places] = sample(logits_BV[places], np.array([rows[place].draw() for place in places]), *settings)
    return chosen


def likeliest(logits_BV: Tensor) -> Ints:
    """The first of the largest logits of each row, (B,). numpy is faster at it on a CPU."""
    on_cpu = logits_BV.device.type == "cpu"
    return logits_BV.numpy().argmax(-1) if on_cpu else logits_BV.argmax(-1).cpu().numpy()
