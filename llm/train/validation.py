"""Validation on the held-out text, and when a run has stopped getting better."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from llm.data.batch import MicroBatch
from llm.data.loader import validation_batches
from llm.data.source import TokenSource
from llm.parallel.collectives import sum_over_ranks
from llm.parallel.engine import Engine
from llm.parallel.grid import Group
from llm.parallel.launch import World
from llm.tokenizer import Tokenizer
from llm.train.config import RunConfig


@dataclass
class Best:
    """The lowest validation loss (nats) so far, its step, and how many validations since were not lower."""

    valid_loss: float | None = None
    step: int | None = None
    since: int = 0

    def update(self, valid_loss: float, step: int) -> bool:
        """Take in a validation; whether it is a new best."""
        if self.valid_loss is not None and valid_loss >= self.valid_loss:
            self.since += 1
            return False
        self.valid_loss, self.step, self.since = valid_loss, step, 0
        return True

    def exhausted(self, patience: int | None) -> bool:
        """Whether `patience` validations in a row brought no new best."""
        return patience is not None and self.since >= patience


def validate(
    engine: Engine,
    sources: Sequence[TokenSource],
    tokenizer: Tokenizer,
    config: RunConfig,
    to_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Loss per target (nats), perplexity and bits per byte of the original text over the held-out sources
    (collective); with optim.ema_decay also the loss of the averaged weights.

    None when `to_stop` came true on any rank meanwhile: a run that is to stop has seconds for it, and a validation may
    take minutes.
    """
    until = partial(_until_stop, to_stop, engine.world)
    try:
        return _validate(engine, sources, tokenizer, config, until)
    except _GivenUp:
        return None


class _GivenUp(Exception):
    pass


def _until_stop(to_stop: Callable[[], bool], world: World, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
    for batch in batches:  # as many on every rank
        if sum_over_ranks([to_stop()], world)[0]:
            raise _GivenUp
        yield batch


def _validate(
    engine: Engine,
    sources: Sequence[TokenSource],
    tokenizer: Tokenizer,
    config: RunConfig,
    until: Callable[[Iterator[MicroBatch]], Iterator[MicroBatch]],
) -> dict[str, float]:
    data, n_bytes_of = engine.grid.data, tokenizer.token_bytes()
    nll, n_targets, n_bytes = engine.sum_nll(until(_batches(sources, config, data)), n_bytes_of)
    loss = nll / max(n_targets, 1)
    found = {
        "valid_loss": loss,
        "valid_ppl": math.exp(min(loss, 700.0)),
        "valid_bits_per_byte": nll / (math.log(2) * max(n_bytes, 1)),
    }
    if config.optim.ema_decay is not None:
        with engine.averaged_weights():
            nll, _, _ = engine.sum_nll(until(_batches(sources, config, data)), n_bytes_of)
        found["valid_loss_ema"] = nll / max(n_targets, 1)
    return found


def _batches(sources: Sequence[TokenSource], config: RunConfig, data: Group) -> Iterator[MicroBatch]:
    max_rows = None
    if config.eval.batches is not None:
        max_rows = config.eval.batches * config.train.micro_batch_size * data.size
    return itertools.chain.from_iterable(
        validation_batches(
            source,
            seq_len=config.train.seq_len,
            micro_batch_size=config.train.micro_batch_size,
            dp_rank=data.rank,
            dp_size=data.size,
            max_rows=max_rows,
        )
        for source in sources
    )
