"""What a task says of itself, and the tasks by name.

To add one: a subclass of `Task` in a file of your own, `register(task)` at the end of it, the file under `extensions`
and the name under `task` in the run config.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from llm.args import ModelArgs, VisionArgs
from llm.batch import Batch
from llm.data.heldout import HeldOut
from llm.data.images import ImageOptions
from llm.data.kinds import ChatOptions, Opened, PackingName
from llm.data.labels import LabelOptions, MaxLength
from llm.data.mixture import Mixture
from llm.data.sources import DataSpec
from llm.data.values import ValueOptions
from llm.decoder import Decoder
from llm.errors import UserError
from llm.model import LLM
from llm.objectives import Objective
from llm.parallel.launch.world import World
from llm.parallel.replica import Predicted
from llm.tokenizer import Tokenizer

REFERENCE = "reference"
"""The values with the summed log-probability of each sample's targets by the model that a run began with, at the first
of these targets."""


Args = TypeVar("Args", bound=ModelArgs)


@dataclass(frozen=True)
class RowsWanted:
    """Which rows a run reads."""

    train: DataSpec
    """`data.train`."""
    valid: DataSpec | float | None
    """`data.valid`."""
    cache_dir: str
    seq_len: int
    seed: int
    """Of the order."""
    held_out_rows: int | None
    """Rows of a validation; None = all."""
    packing: PackingName | None = None
    """`data.packing`."""
    chat: ChatOptions = field(default_factory=ChatOptions)
    """The section `chat`."""
    tokenizer_path: str | None = None
    """Where the tokenizer came from, with its template."""
    vision: VisionArgs | None = None
    """How the model reads images; None: it cannot."""
    images: ImageOptions = ImageOptions()
    """Which of them are read."""
    labels: LabelOptions | None = None
    """What the model predicts of whole samples; None: nothing."""
    values: ValueOptions | None = None
    """How the model reads values; None: it does not."""
    source_len: int | None = None
    """Positions of a row for what the encoder reads; None: the model has no encoder."""
    pair_max_length: MaxLength = "error"
    """`pair.max_length`."""
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The config's sections of tasks, by a task's name."""


@dataclass(frozen=True)
class OpenedRows:
    """The rows of a run."""

    train: Mixture
    valid: HeldOut | None
    notes: list[str]
    """Lines about what they are made of."""


class Task(ABC):
    """What a model is trained to do."""

    name: str
    target: str | None = None
    """Name of the targets that the rows of a source must have, before `view`; None: the task's own."""
    compares_with_start = False
    """Whether its objectives read the values REFERENCE."""

    continues = True
    """Whether `sample` continues texts."""

    @property
    def parts(self) -> tuple["Part", ...]:
        """The tasks that it is made of: itself, but for a mixture."""
        return (Part(self),)

    @abstractmethod
    def objectives(self, options: Mapping[str, Any] | None = None) -> tuple[Objective, ...]:
        """What it is trained for; the first is what a validation measures. options: what the config's section of the
        task's own name says, where there is such a section.
        """

    def check(self, tokenizer: Tokenizer, options: Mapping[str, Mapping[str, Any]]) -> None:  # noqa: B027
        """UserError where texts of this tokenizer cannot be trained on so, before any work is done. options: as in
        `RowsWanted`.
        """

    @abstractmethod
    def open_rows(self, wanted: RowsWanted, tokenizer: Tokenizer, world: World) -> OpenedRows:
        """The training and held-out rows (collective). UserError on all ranks where they cannot be read."""

    def settle(self, args: Args, rows: OpenedRows, began_from: ModelArgs | None) -> Args:
        """The model with what only the rows say of it, as the names of classes, before it is built; the same on all
        ranks, whatever the layout. began_from: the model whose weights the run begins with. UserError where rows and
        model do not go together.
        """
        return args

    def view(
        self, name: str, opened: Opened, wanted: RowsWanted, tokenizer: Tokenizer, held_out: bool
    ) -> Opened:
        """What the task reads of an opened source. name: the source's; held_out: whether it is for validation.
        UserError where its rows have not what the task needs.
        """
        target = self.target or self.name
        if target not in opened.rows.targets:
            raise UserError(
                f"{opened.given}: its rows have targets for {' and '.join(opened.rows.targets)}, and task={self.name} "
                f"trains on those for {target}"
            )
        return opened

    @abstractmethod
    def counter(self, tokenizer: Tokenizer) -> Callable[[Batch], list[float]]:
        """Counts what `metrics` needs of a held-out batch, first what the mean of the main objective divides by; the
        counts are summed over all batches.
        """

    @abstractmethod
    def metrics(self, loss_sum: float, counts: Sequence[float]) -> dict[str, float]:
        """What a validation says, from the sums over the held-out rows: fields of metrics.jsonl, `valid_loss` first.
        The main objective's measures come besides.
        """

    def scores(self, args: ModelArgs, predicted: Predicted) -> dict[str, float | None]:
        """What a validation says besides where the main objective predicts documents: `valid_` and a name; None where
        a score has no value. args: of the model.
        """
        return {}

    def fields(self, args: ModelArgs) -> tuple[str, ...] | None:
        """Names of all that a validation may say, without `valid_`; None where that is not known before one. Who
        overrides `metrics` does so here too.
        """
        return None

    def sample(
        self,
        decoder: LLM | Decoder,
        tokenizer: Tokenizer,
        prompts: Sequence[Sequence[int]],
        *,
        most_tokens: int,
        context: int,
        temperature: float,
        seed: int,
        end_ids: Sequence[int] | None = None,
        images: Sequence[Tensor | None] | None = None,
    ) -> list[str]:
        """What the model makes of each prompt, as text; drawn by the seed. end_ids: what ends one; None: what ends a
        text of the tokenizer. images: of each prompt, the tiles that fill its slots. Nothing where a task's models
        continue no text."""
        return []


@dataclass(frozen=True)
class Part:
    """A task, alone or of several."""

    task: Task
    weight: float = 1.0
    """Of its loss."""
    sources: tuple[str, ...] | None = None
    """Names of the data sources that it reads, for training and held out; None: all."""

    def __str__(self) -> str:
        read = "" if self.sources is None else f" on {', '.join(self.sources)}"
        return f"{self.task.name}{read}, its loss times {self.weight:g}"

    def reads(self, source: str) -> bool:
        """Whether a data source of this name is one of its own."""
        return self.sources is None or source in self.sources


TASKS: dict[str, Task] = {}
"""By name."""


def register(task: Task) -> None:
    """Make a task known by its name. ValueError where the name is taken."""
    if task.name in TASKS:
        raise ValueError(f"a task is called {task.name} already")
    TASKS[task.name] = task


def task_named(name: str, key: str = "task") -> Task:
    """The task of a name, which stands under `key`. ValueError with the known ones where there is none."""
    if name not in TASKS:
        raise ValueError(f"{key}={name}: no such task; known are {', '.join(sorted(TASKS))}")
    return TASKS[name]
