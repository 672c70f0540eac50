"""Validation on the held-out text, and when a run has stopped getting better."""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from tqdm import tqdm

from llm.data.batch import MicroBatch
from llm.data.heldout import HeldOut
from llm.parallel.collectives import agreed_error, sum_over_ranks
from llm.parallel.engine import Engine
from llm.parallel.grid import Grid
from llm.parallel.launch.world import World
from llm.tokenizer import Tokenizer
from llm.train.config import RunConfig


@dataclass
class Best:
    """The lowest validation loss (nats) so far, its step, and how many validations since were not lower; `rows` and
    `held_out` (a fingerprint) are the held-out rows that all of these were measured on.
    """

    valid_loss: float | None = None
    step: int | None = None
    since: int = 0
    rows: int | None = None
    held_out: str | None = None

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

    def on(self, held_out: HeldOut) -> tuple["Best", list[str]]:
        """This, as far as it holds for these held-out rows: what was measured on other rows says nothing of them. And
        lines that say so.
        """
        fresh = Best(rows=held_out.n_rows, held_out=held_out.fingerprint)
        if self.held_out == held_out.fingerprint:
            return self, []
        if self.held_out is None and self.valid_loss is None:
            return fresh, []
        if self.held_out is None:
            why = f"the checkpoint does not say which held-out rows its validations read; now {held_out.described()}"
        else:
            why = f"a validation reads other rows now: {self.rows:,} rows -> {held_out.described()}"
        if self.valid_loss is None:
            return fresh, [f"changed: {why}"]
        gone = f"the best validation loss so far, {self.valid_loss:.4f} of step {self.step}, counts no more"
        return fresh, [f"changed: {why}; {gone}"]


def settle_rows(config: RunConfig) -> tuple[RunConfig, str]:
    """The config without the older `eval.batches`, which has set eval.rows; and what decides the rows, in words."""
    rows, batches = config.eval.rows, config.eval.batches
    if batches is None:
        return config, f"eval.rows={'null' if rows is None else rows}"
    size = config.train.global_batch_size
    told = f"eval.batches={batches} is {batches} x train.global_batch_size={size} rows on any layout: eval.rows={rows}"
    return config.model_copy(update={"eval": config.eval.model_copy(update={"batches": None})}), told


def validate(
    engine: Engine,
    held_out: HeldOut,
    tokenizer: Tokenizer,
    config: RunConfig,
    to_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Loss per target (nats), perplexity and bits per byte of the original text over the held-out rows (collective);
    with optim.ema_decay also the loss of the averaged weights. Equal on every layout.

    None when `to_stop` came true on any rank meanwhile: a run that is to stop has seconds for it, and a validation may
    take minutes.
    """
    until = partial(_until_stop, to_stop, engine.world)
    passes = 1 if config.optim.ema_decay is None else 2
    try:
        with _Bar(passes * held_out.n_rows, engine.grid) as bar:
            return _validate(engine, held_out, tokenizer, config, lambda batches: bar.over(until(batches)))
    except _GivenUp:
        return None


class _GivenUp(Exception):
    pass


def _until_stop(to_stop: Callable[[], bool], world: World, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
    for batch in batches:  # as many on every rank
        if sum_over_ranks([to_stop()], world)[0]:
            raise _GivenUp
        yield batch


class _Bar:
    """A bar of held-out rows on rank 0's terminal, gone when they are read. A terminal that cannot be written to any
    more ends the bar, not the validation.
    """

    def __init__(self, rows: int, grid: Grid) -> None:
        self._data_ranks = grid.data.size
        self._bar: Any = None
        if grid.world.is_main and sys.stderr.isatty():
            with suppress(OSError, ValueError):
                self._bar = tqdm(total=rows, unit="row", desc="validation", leave=False, dynamic_ncols=True)

    def over(self, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        """The batches; each moves the bar by the rows that all ranks read with it."""
        for batch in batches:
            yield batch
            if self._bar is not None:
                rows = min(len(batch.tokens_BT) * self._data_ranks, self._bar.total - self._bar.n)
                self._try(partial(self._bar.update, rows))

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except (OSError, ValueError):
            self._bar = None

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._try(self._bar.close)


def _validate(
    engine: Engine,
    held_out: HeldOut,
    tokenizer: Tokenizer,
    config: RunConfig,
    until: Callable[[Iterator[MicroBatch]], Iterator[MicroBatch]],
) -> dict[str, float]:
    n_bytes_of = tokenizer.token_bytes()
    cut = (config.train.micro_batch_size, engine.grid.data.rank, engine.grid.data.size)
    nll, n_targets, n_bytes = engine.sum_nll(until(held_out.batches(*cut)), n_bytes_of)
    if n_targets == 0:  # a mean over nothing would be the best loss of all
        raise agreed_error(f"data.valid: {held_out.described()} have no token to predict; give more eval.rows")
    loss = nll / n_targets
    found = {
        "valid_loss": loss,
        "valid_ppl": math.exp(min(loss, 700.0)),
        "valid_bits_per_byte": nll / (math.log(2) * max(n_bytes, 1)),
    }
    if config.optim.ema_decay is not None:
        with engine.averaged_weights():
            nll, _, _ = engine.sum_nll(until(held_out.batches(*cut)), n_bytes_of)
        found["valid_loss_ema"] = nll / n_targets
    return found
