"""Validation on the held-out rows: of every task of the run, in one pass over them."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from tqdm import tqdm

from llm.batch import Batch
from llm.data.heldout import HeldOut
from llm.objectives import Objective
from llm.parallel.collectives import agreed_error, sum_over_ranks
from llm.parallel.engine.engine import Engine
from llm.parallel.grid import Grid
from llm.parallel.launch.world import World
from llm.parallel.replica import Sums
from llm.tasks import Task
from llm.tasks.base import Part
from llm.tasks.mixture import own_rows
from llm.tokenizer import Tokenizer
from llm.train.best import VALID_LOSS
from llm.train.config import RunConfig

VALID = "valid_"
"""What the fields of a validation begin with."""


def validate(
    engine: Engine,
    task: Task,
    held_out: HeldOut,
    tokenizer: Tokenizer,
    config: RunConfig,
    to_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float | None] | None:
    """What the task says of the held-out rows (collective); with optim.ema_decay also the loss of the averaged weights.
    Equal on every layout. Of several tasks `valid_loss` is the sum of weight x loss, and `valid_TASK_...` what each of
    them says of its own rows.

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


@dataclass(frozen=True)
class _Measured:
    """A part of the run's task as a validation measures it."""

    part: Part
    objective: Objective
    counter: Callable[[Batch], Sequence[float]]
    prefix: str
    """Of its fields."""

    def described(self) -> str:
        return "" if self.prefix == VALID else f" of task {self.part.task.name}"


def _measured(engine: Engine, task: Task, held_out: HeldOut, tokenizer: Tokenizer) -> list[_Measured]:
    """The parts that have held-out rows."""
    found = []
    for part, objective in zip(task.parts, engine.objectives.mains, strict=True):
        numbers = [number for number, name in enumerate(held_out.names) if part.reads(name)]
        if part.sources is not None and not numbers:
            continue
        counter = part.task.counter(tokenizer)
        if part.sources is not None:
            counter = partial(_of_own_rows, counter, numbers)
        prefix = VALID if len(task.parts) == 1 else f"{VALID}{part.task.name}_"
        found.append(_Measured(part, objective, counter, prefix))
    return found


def _of_own_rows(counter: Callable[[Batch], list[float]], sources: Sequence[int], batch: Batch) -> list[float]:
    return counter(own_rows(batch, sources))


def _validate(
    engine: Engine,
    task: Task,
    held_out: HeldOut,
    tokenizer: Tokenizer,
    config: RunConfig,
    until: Callable[[Iterator[Batch]], Iterator[Batch]],
) -> dict[str, float | None]:
    cut = (config.train.micro_batch_size, engine.grid.rows.rank, engine.grid.rows.size)
    measured = _measured(engine, task, held_out, tokenizer)

    def sums() -> list[Sums]:
        objectives, counters = [each.objective for each in measured], [each.counter for each in measured]
        return engine.replica.sum_losses(objectives, until(held_out.batches(*cut)), counters)

    found: dict[str, float | None] = {}
    loss = 0.0
    for each, of_each in zip(measured, sums(), strict=True):
        if not any(of_each.counts[:1]):  # a mean over nothing would be the best loss of all
            what = "label" if each.objective.predicts else "token"
            raise agreed_error(
                f"data.valid: {held_out.described()} have no {what} to predict{each.described()}; give more eval.rows"
            )
        of_task: dict[str, float | None] = {**each.part.task.metrics(of_each.total, of_each.counts)}
        of_task |= {f"{VALID}{name}": total / of_each.counts[0] for name, total in of_each.measures.items()}
        if of_each.predicted is not None:
            of_task |= each.part.task.scores(engine.model.args, of_each.predicted)
        loss += each.part.weight * _loss(each, of_each)
        found |= {f"{each.prefix}{name.removeprefix(VALID)}": value for name, value in of_task.items()}
    if len(task.parts) > 1:
        found = {VALID_LOSS: loss, **found}
    if config.optim.ema_decay is not None:
        with engine.averaged_weights():
            averaged = sums()
        of_parts = (each.part.weight * _loss(each, own) for each, own in zip(measured, averaged, strict=True))
        found["valid_loss_ema"] = sum(of_parts)
    return found


def _loss(measured: _Measured, sums: Sums) -> float:
    return measured.part.task.metrics(sums.total, sums.counts)[VALID_LOSS]
