"""Several tasks in one run: each reads its own sources, and has its own loss, denominator and metrics.

How often rows of a task are read is said by the weights of its sources; the weight of a task multiplies its loss. Rows
of all tasks go through the model together, some of them causal and some not, and every row has targets of its own task
alone. All losses are made of every micro-batch on every rank, whichever rows it has, so that ranks agree on what they
gather.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from llm.args import ModelArgs
from llm.batch import Batch
from llm.data.kinds import Opened
from llm.errors import UserError
from llm.objectives import Objective
from llm.parallel.launch.world import World
from llm.tasks.base import OpenedRows, Part, RowsWanted, Task, task_named
from llm.tasks.rows import opened_rows
from llm.tokenizer import Tokenizer

Args = TypeVar("Args", bound=ModelArgs)
CONTINUES = "lm"
"""The task whose samples are those of a mixture."""


class Mixture(Task):
    name = "mixture"

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = tuple(parts)
        self.continues = any(part.task.name == CONTINUES for part in parts)

    @property
    def parts(self) -> tuple[Part, ...]:
        return self._parts

    @classmethod
    def of(cls, entries: Sequence[tuple[str, float, str]]) -> "Mixture":
        """Of (task, weight, source) in the order of the config; entries of one task are one part. ValueError naming
        the entry where there is no such task, two weights of one task differ, or the task is for a run of its own.
        """
        sources: dict[str, list[str]] = {}
        weights: dict[str, float] = {}
        for i, (name, weight, source) in enumerate(entries):
            if task_named(name, f"task.{i}.task").compares_with_start:
                raise ValueError(f"task.{i}.task={name}: is trained alone; set task={name}")
            if weights.setdefault(name, weight) != weight:
                first = next(j for j, entry in enumerate(entries) if entry[0] == name)
                raise ValueError(
                    f"task.{i}.weight={weight}: task.{first} gives {name} the weight {weights[name]}, and the loss of "
                    f"a task has one; how often a source is read is said by its weight under data.train"
                )
            sources.setdefault(name, []).append(source)
        return cls([Part(task_named(name), weights[name], tuple(of_task)) for name, of_task in sources.items()])

    def part_of(self, source: str) -> Part:
        """The part that reads a source of this name. UserError where none does."""
        for part in self.parts:
            if part.reads(source):
                return part
        raise UserError(f"task: no entry reads the data source {source}")

    def objectives(self, options: Mapping[str, Any] | None = None) -> tuple[Objective, ...]:
        """options: by the name of a task."""
        return tuple(objective for of_part in objectives_of_parts(self.parts, options or {}) for objective in of_part)

    def check(self, tokenizer: Tokenizer, options: Mapping[str, Mapping[str, Any]]) -> None:
        for part in self.parts:
            part.task.check(tokenizer, options)

    def open_rows(self, wanted: RowsWanted, tokenizer: Tokenizer, world: World) -> OpenedRows:
        opened = opened_rows(wanted, tokenizer, world, self)
        return replace(opened, notes=[*opened.notes, f"tasks: {'; '.join(map(str, self.parts))}"])

    def view(self, name: str, opened: Opened, wanted: RowsWanted, tokenizer: Tokenizer, held_out: bool) -> Opened:
        own = self.part_of(name)
        found = own.task.view(name, opened, wanted, tokenizer, held_out)
        for part in self.parts:
            if part is not own and part.task.name in found.rows.targets:
                raise UserError(
                    f"{opened.given}: its rows have targets for {part.task.name} too, and {own.task.name} reads them"
                )
        return found

    def settle(self, args: Args, rows: OpenedRows, began_from: ModelArgs | None) -> Args:
        for part in self.parts:
            args = part.task.settle(args, rows, began_from)
        return args

    def counter(self, tokenizer: Tokenizer) -> Callable[[Batch], list[float]]:
        raise NotImplementedError("the parts of a mixture are counted each by itself")

    def metrics(self, loss_sum: float, counts: Sequence[float]) -> dict[str, float]:
        raise NotImplementedError("the parts of a mixture are measured each by itself")

    def fields(self, args: ModelArgs) -> tuple[str, ...] | None:
        found = ["loss"]
        for part in self.parts:
            own = part.task.fields(args)
            if own is None:
                return None
            found += [f"{part.task.name}_{name}" for name in own]
        return tuple(found)

    def sample(self, *given: Any, **options: Any) -> list[str]:
        """That of its part `lm`; without one there is none."""
        found = next((part.task for part in self.parts if part.task.name == CONTINUES), None)
        return [] if found is None else found.sample(*given, **options)


def objectives_of_parts(parts: Sequence[Part], options: Mapping[str, Mapping[str, Any]]) -> list[tuple[Objective, ...]]:
    """What each part of a task is trained for, with its weight. options: by the name of a task."""
    found = [part.task.objectives(options.get(part.task.name)) for part in parts]
    for part, objectives in zip(parts, found, strict=True):
        for objective in objectives:
            objective.weight *= part.weight
    return found


def own_rows(batch: Batch, sources: Sequence[int]) -> Batch:
    """A batch of whole rows as one of its parts sees it: what rows of other sources hold is no data. sources: numbers
    of the part's.
    """
    assert batch.rows is not None
    own_R1 = torch.isin(torch.from_numpy(batch.rows.source), torch.tensor(list(sources), dtype=torch.int64))[:, None]
    valid = own_R1.expand(batch.inputs.tokens.shape) if batch.valid is None else batch.valid & own_R1
    return replace(batch, valid=valid)
