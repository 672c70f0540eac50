"""Answers to Continue requests: rows that decode together, each as if it were alone.

The longest prompts come first. An answer is a function of its request: its tokens are those of its own prompt, and its
draws are numbered by the seed, the prompt and which of several answers it is. So what runs beside it, in which order,
on how many ranks, decides only how fast it goes.

Shapes: B rows, T longest prompt, V vocabulary.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm.evaluate.endings import AnswerText
from llm.evaluate.requests import Continue, Continued, NonFinite
from llm.generate import left_padded
from llm.generation.pictures import Pictures
from llm.generation.sampling import Sampling, penalised, sample
from llm.generation.text import FinishReason, context_length
from llm.init import uniform
from llm.parallel.replica import Replica
from llm.tokenizers.base import Tokenizer

MOST_ROWS = 64
"""That decode together: beyond it a step takes as much longer as it has more rows."""
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
    """(index, answer) of each request as it is done; on all ranks of the replica alike (collective).

    Args:
        end_ids: tokens that end an answer.
        batch_tokens: of the rows that decode together, prompts and most new tokens; one row may have more.

    Raises ValueError for a request that no answer can be made to, NonFinite where the model's logits are not finite,
    UserError where an image is no longer what it was.
    """
    context = context_length(replica.model.args)
    for index, request in enumerate(requests):
        _check(request, index, context, replica.model.args.vocab_size)
    waiting = deque(sorted(range(len(requests)), key=lambda index: (-len(requests[index].prompt), index)))
    while waiting:
        rows = [
            _Row.of(index, requests[index], tokenizer, context)
            for index in _admitted(waiting, requests, batch_tokens, context)
        ]
        yield from _to_the_end(replica, tokenizer, frozenset(end_ids), rows, pictures)


def _check(request: Continue, index: int, context: int, vocab_size: int) -> None:
    name, length = f"request {index}", len(request.prompt)
    if not request.prompt:
        raise ValueError(f"{name}: a prompt needs at least one token")
    if length >= context:
        raise ValueError(f"{name}: its prompt of {length} tokens leaves no room in the context of {context}")
    if not 0 <= min(request.prompt) <= max(request.prompt) < vocab_size:
        raise ValueError(f"{name}: token ids must lie between 0 and {vocab_size - 1}")
    if request.max_new_tokens < 1:
        raise ValueError(f"{name}: max_new_tokens={request.max_new_tokens} must be at least 1")
    if "" in request.stop:
        raise ValueError(f"{name}: a stop text is empty")


def _admitted(waiting: deque[int], requests: Sequence[Continue], batch_tokens: int, context: int) -> list[int]:
    """The next requests that decode together, taken from those waiting."""
    taken: list[int] = []
    width = 0
    while waiting and len(taken) < MOST_ROWS:
        request = requests[waiting[0]]
        width = max(width, min(context, len(request.prompt) + request.max_new_tokens))
        if taken and (len(taken) + 1) * width > batch_tokens:
            break
        taken.append(waiting.popleft())
    return taken


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
    n_tokens: int = 0
    draws: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, index: int, request: Continue, tokenizer: Tokenizer, context: int) -> "_Row":
        said = hashlib.blake2b(np.array(request.prompt, dtype="<i8").tobytes(), digest_size=16)
        for picture in request.pictures:
            said.update(picture.digest.encode())
        key = f"evaluate.prompt{said.hexdigest()}.sample{request.sample}"
        limit = min(request.max_new_tokens, context - len(request.prompt))
        return cls(index, request, limit, AnswerText(tokenizer, request.prompt, request.stop), key)

    def draw(self) -> float:
        """The random number of its next token."""
        if self.n_tokens >= len(self.draws):
            numbers = uniform(self.request.sampling.seed, self.key, self.n_tokens, self.n_tokens + DRAWS)
            self.draws.extend(numbers.tolist())
        return self.draws[self.n_tokens]

    def push(self, token: int, end_ids: frozenset[int]) -> FinishReason | None:
        """Add a token; why the answer ends with it."""
        self.n_tokens += 1
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


def _to_the_end(
    replica: Replica, tokenizer: Tokenizer, end_ids: frozenset[int], rows: list[_Row], pictures: Pictures
) -> Iterator[tuple[int, Continued]]:
    """The answers of rows that begin together."""
    decoder = replica.decoder()
    tokens, positions = left_padded([row.request.prompt for row in rows])
    images = pictures.tiles([picture for row in rows for picture in row.request.pictures])
    chooser = Chooser(min(tokenizer.vocab_size, replica.model.args.vocab_size))
    chooser.join([row.request for row in rows])
    while rows:
        logits_BV = decoder.logits(tokens, positions, images)[:, : tokenizer.vocab_size]
        _check_finite(logits_BV, rows)
        chosen = chooser(logits_BV, [row.request.sampling for row in rows], [row.draw for row in rows])
        going = []
        for place, (row, token) in enumerate(zip(rows, chosen.tolist(), strict=True)):
            reason = row.push(token, end_ids)
            if reason is None:
                going.append(place)
            else:
                yield row.index, row.answer(reason)
        if 0 < len(going) < len(rows):
            decoder.keep(going)
            chooser.keep(going)
        rows = [rows[place] for place in going]
        tokens, positions, images = chosen[going, None], positions[going, -1:] + 1, None


def _check_finite(logits_BV: Tensor, rows: Sequence[_Row]) -> None:
    finite_BV = logits_BV.isfinite()
    if not finite_BV.all():
        bad = int((~finite_BV).any(-1).int().argmax())
        count, of = int((~finite_BV[bad]).sum()), finite_BV.shape[-1]
        raise NonFinite(
            rows[bad].index, f"at new token {rows[bad].n_tokens + 1}, {count} of {of} logits are not finite"
        )


class Chooser:
    """Which token comes next in each of several rows with settings of their own."""

    def __init__(self, n_ids: int) -> None:
        """n_ids: of the vocabulary."""
        self._n_ids = n_ids
        self._seen: list[NDArray[np.bool_] | None] = []  # of each row with a penalty, which ids stand in it

    def join(self, requests: Sequence[Continue]) -> None:
        """Take in rows, after those there."""
        for request in requests:
            seen = None
            if request.sampling.repetition_penalty != 1:
                seen = np.zeros(self._n_ids, dtype=bool)
                seen[[token for token in request.prompt if token < self._n_ids]] = True
            self._seen.append(seen)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone."""
        self._seen = [self._seen[row] for row in rows]

    def __call__(
        self, logits_BV: Tensor, settings: Sequence[Sampling], draws: Sequence[Callable[[], float]]
    ) -> Ints:
        """A token for each row, (B,). draws: of each row, called where it samples."""
        logits_BV = self._penalised(logits_BV, settings)
        chosen = logits_BV.argmax(-1).cpu().numpy()
        kinds: dict[tuple[float, int | None, float | None], list[int]] = {}
        for row, setting in enumerate(settings):
            if setting.temperature > 0:
                kinds.setdefault((setting.temperature, setting.top_k, setting.top_p), []).append(row)
        for kind, rows in kinds.items():
            chosen[rows] = sample(logits_BV[rows], np.array([draws[row]() for row in rows]), *kind)
        for row, seen in enumerate(self._seen):
            if seen is not None:
                seen[chosen[row]] = True
        return chosen

    def _penalised(self, logits_BV: Tensor, settings: Sequence[Sampling]) -> Tensor:
        with_penalty = [row for row, seen in enumerate(self._seen) if seen is not None]
        if not with_penalty:
            return logits_BV
        logits_BV = logits_BV.clone()
        for row in with_penalty:
            seen_1V = torch.from_numpy(self._seen[row])[None].to(logits_BV.device)
            logits_BV[row : row + 1] = penalised(logits_BV[row : row + 1], seen_1V, settings[row].repetition_penalty)
        return logits_BV
