"""Validation on the held-out text."""

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

from tqdm import tqdm

from llm.batch import Batch
from llm.data.heldout import HeldOut
from llm.parallel.collectives import agreed_error, sum_over_ranks
from llm.parallel.engine.engine import Engine
from llm.parallel.grid import Grid
from llm.parallel.launch.world import World
from llm.tasks import Task
from llm.tokenizer import Tokenizer
from llm.train.config import RunConfig


def validate(
    engine: Engine,
    task: Task,
    held_out: HeldOut,
    tokenizer: Tokenizer,
    config: RunConfig,
    to_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """What the task says of the held-out rows (collective); with optim.ema_decay also the loss of the averaged weights.
    Equal on every layout.

    None when `to_stop` came true on any rank meanwhile: a run that is to stop has seconds for it, and a validation may
    take minutes.
    """
    until = partial(_until_stop, to_stop, engine.world)
    passes = 1 if config.optim.ema_decay is None else 2
    try:
        with _Bar(passes * held_out.n_rows, engine.grid) as bar:
            return _validate(engine, task, held_out, tokenizer, config, lambda batches: bar.over(until(batches)))
    except _GivenUp:
        return None


class _GivenUp(Exception):
    pass


def _until_stop(to_stop: Callable[[], bool], world: World, batches: Iterator[Batch]) -> Iterator[Batch]:
    for batch in batches:  # as many on every rank
        if sum_over_ranks([to_stop()], world)[0]:
            raise _GivenUp
        yield batch


class _Bar:
    """A bar of held-out rows on rank 0's terminal, gone when they are read. A terminal that cannot be written to any
    more ends the bar, not the validation.
    """

    def __init__(self, rows: int, grid: Grid) -> None:
        self._data_ranks = grid.rows.size
        self._bar: Any = None
        if grid.world.is_main and sys.stderr.isatty():
            with suppress(OSError, ValueError):
                self._bar = tqdm(total=rows, unit="row", desc="validation", leave=False, dynamic_ncols=True)

    def over(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches; each moves the bar by the rows that all ranks read with it."""
        for batch in batches:
            yield batch
            if self._bar is not None:
                rows = min(len(batch.inputs.tokens) * self._data_ranks, self._bar.total - self._bar.n)
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
    task: Task,
    held_out: HeldOut,
    tokenizer: Tokenizer,
    config: RunConfig,
    until: Callable[[Iterator[Batch]], Iterator[Batch]],
) -> dict[str, float]:
    counter = task.counter(tokenizer)
    cut = (config.train.micro_batch_size, engine.grid.rows.rank, engine.grid.rows.size)
    main = engine.objectives.main
    loss_sum, measures, counts = engine.replica.sum_losses(main, until(held_out.batches(*cut)), counter)
    if not any(counts[:1]):  # a mean over nothing would be the best loss of all
        raise agreed_error(f"data.valid: {held_out.described()} have no token to predict; give more eval.rows")
    found = task.metrics(loss_sum, counts)
    found |= {f"valid_{name}": total / counts[0] for name, total in measures.items()}
    if config.optim.ema_decay is not None:
        with engine.averaged_weights():
            loss_sum, _, _ = engine.replica.sum_losses(main, until(held_out.batches(*cut)), counter)
        found["valid_loss_ema"] = task.metrics(loss_sum, counts)["valid_loss"]
    return found
