"""Answers to Continue requests that are searched for (llm/generation/beams.py): prompts of similar length together,
which begin and end as one batch.
"""

from collections.abc import Collection, Iterator, Sequence
from itertools import groupby

from llm.args import ModelArgs
from llm.evaluate.requests import Continue, Continued, NonFinite
from llm.generation.beams import beam_stream
from llm.generation.pictures import Pictures
from llm.generation.sampling import NonFiniteLogits
from llm.generation.text import FinishReason, context_length, searched_text
from llm.parallel.replica import Replica
from llm.tokenizers.base import Tokenizer


def search(
    replica: Replica,
    tokenizer: Tokenizer,
    end_ids: Collection[int],
    requests: Sequence[tuple[int, Continue]],
    batch_tokens: int,
    pictures: Pictures,
) -> Iterator[tuple[int, Continued]]:
    """(index, answer) of each of these requests, which come with their indices; arguments and errors are as of
    llm.evaluate.continuing.continue_ (collective)."""
    args = replica.model.args
    for batch in _batches(requests, batch_tokens, context_length(args)):
        yield from _searched(replica, tokenizer, frozenset(end_ids), batch, pictures, args)


def _searched(
    replica: Replica,
    tokenizer: Tokenizer,
    end_ids: frozenset[int],
    batch: Sequence[tuple[int, Continue]],
    pictures: Pictures,
    args: ModelArgs,
) -> Iterator[tuple[int, Continued]]:
    first = batch[0][1]
    limits = [_limit(request, context_length(args)) for _, request in batch]

    def text(row: int, ids: Sequence[int]) -> tuple[str, bool]:
        return searched_text(tokenizer, batch[row][1].prompt, ids, end_ids, first.stop)

    made = beam_stream(
        replica.decoder(),
        [request.prompt for _, request in batch],
        first.beams,
        max_new_tokens=limits,
        stop_ids=end_ids,
        n_ids=min(tokenizer.vocab_size, args.vocab_size),
        images=[pictures.tiles(request.pictures) for _, request in batch],
        sources=[request.source for _, request in batch] if first.source else None,
        repetition_penalty=first.sampling.repetition_penalty,
        ended=(lambda row, ids: text(row, ids)[1]) if first.stop else None,
    )
    try:
        for row, (best, *_) in made:
            index, request = batch[row]
            found, stopped = text(row, best.tokens)
            whole = limits[row] == request.max_new_tokens
            reason: FinishReason = "stop" if stopped else "length" if whole else "context"
            yield index, Continued(found, len(best.tokens), reason)
    except NonFiniteLogits as error:
        index = batch[error.row][0]
        said = f"at new token {error.step}, {error.count} of {error.of} logits are not finite"
        raise NonFinite(index, said) from None


def _limit(request: Continue, context: int) -> int:
    """Most new tokens."""
    return min(request.max_new_tokens, context - len(request.prompt))


def _batches(
    requests: Sequence[tuple[int, Continue]], batch_tokens: int, context: int
) -> Iterator[list[tuple[int, Continue]]]:
    """Requests with the same settings, the longest prompts first, as many as the tokens allow, at least one."""

    def settings(one: tuple[int, Continue]) -> str:
        _, request = one
        return repr((request.beams, request.stop, request.sampling))

    for _, alike in groupby(sorted(requests, key=lambda one: (settings(one), -one[1].n_tokens, one[0])), settings):
        batch: list[tuple[int, Continue]] = []
        for one in alike:
            together = [*batch, one]
            width = together[0][1].n_tokens + max(_limit(request, context) for _, request in together)
            if batch and len(together) * one[1].beams.num_beams * width > batch_tokens:
                yield batch
                together = [one]
            batch = together
        yield batch
