"""What every kind of task does: rows become documents with requests, answers are measured, measures become results.

A kind says what it asks of a row, what a document's answers are worth, and which metrics that gives. Documents are the
same on every rank, and whatever is wrong with a row is said before anything is asked.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from llm.args import ModelArgs
from llm.errors import UserError
from llm.evaluate.encode import Encoder
from llm.evaluate.requests import Answer, Continued, Request, Score, Scored
from llm.evaluate.tasks.asked import Asked, Example, Head, Setting
from llm.evaluate.tasks.config import (
    AskingConfig,
    FewshotConfig,
    TaskConfig,
    TaskOptions,
    checked,
    digest_of,
    found_paths,
)  # fmt: skip
from llm.evaluate.tasks.rows import EvalRow, Rows, as_json
from llm.evaluate.tasks.statistics import OfRows, OfSums, bootstrap_of_rows, bootstrap_stderr, mean_stderr
from llm.evaluate.tasks.template import Template
from llm.generation.pictures import Pictures
from llm.tokenizers.chat import ChatTemplate

Measures = dict[str, float | None]
"""What a document's answers are worth, by metric; None where that metric says nothing of it."""
ASKED_BY = ("description", "prompt", "prompts", "target")
"""Keys that results repeat, as other prompts give other numbers."""
VERSION = 1  # raise it when the same task file and data would make other requests or results


@dataclass(frozen=True)
class Document:
    """A row as it is put to a model."""

    number: int
    """among the rows, from 1"""
    place: str
    """its file and row, for messages"""
    doc: dict[str, Any]
    """the row, in values of JSON"""
    prompt: str
    """all that is read before the answer"""
    requests: tuple[Request, ...]
    asked: tuple[str, ...]
    """the text whose log-probability each Score is, in the order of requests; "" for a Continue"""
    gold: Any = None
    counts: Mapping[str, int] = field(default_factory=dict)
    """truncated, joint, ..: 1 where that happened"""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """what its kind needs to measure it"""


@dataclass(frozen=True)
class Metric:
    """How documents' measures become one number."""

    columns: tuple[str, ...] = ()
    """measures that are summed; () = the mean of the measure of the metric's own name"""
    of_sums: OfSums | None = None
    of_rows: OfRows | None = None
    """of the measures of all documents, where sums do not say it"""


class EvalTask(ABC):
    """A task over files. The kinds are its subclasses, in KINDS."""

    kind: ClassVar[str]
    schema: ClassVar[type[TaskConfig]]
    defaults: ClassVar[tuple[str, ...]]
    """metrics where the file names none"""
    of_whole_texts: ClassVar[bool] = False
    """whether it asks nothing of what follows a text"""

    def __init__(self, content: dict[str, Any], file: Path, options: TaskOptions) -> None:
        """UserError naming the file where a key is wrong, a template cannot be used or data is not there."""
        self.file, self.options = file, options
        self.config = checked(content, self.schema, file)
        self.name, self.version = self.config.name, self.config.version
        data = self.config.data
        places = self._found(data.path, "data.path")
        with self._naming_file():
            self.rows = Rows(places, "data.path", data.split)
        self.examples: Rows | None = None
        """what examples are taken from, where that is not the task's own data"""
        self.k = 0
        if isinstance(self.config, FewshotConfig):
            shots = self.config.fewshot
            self.k = shots.k if options.num_fewshot is None else options.num_fewshot
            if self.k and shots.path is not None:
                others = Rows(self._found(shots.path, "fewshot.path"), "fewshot.path")
                own = [file.identity for file in others.files] == [file.identity for file in self.rows.files]
                self.examples = None if own else others
        elif options.num_fewshot:
            raise UserError(
                f"{file}: --num_fewshot={options.num_fewshot}: kind {self.kind} has no examples before its documents; "
                f"evaluate {self.name} in a command of its own without it"
            )
        with self._naming_file():
            self.metrics: tuple[str, ...] = tuple(dict.fromkeys(self.config.metrics)) or self.defaults
            self.settle()
            for metric in self.metrics:
                if self.metric(metric) is None:
                    raise UserError(f"metrics: {self.kind} has no {metric!r}; possible are {self.possible()}")
        self.digest = self._digest()
        self.partial = False
        """whether `limit` left rows out, known when documents were read"""
        self._examples: list[EvalRow] | None = None
        self._made: dict[int, Example] = {}

    def settle(self) -> None:  # noqa: B027 - a kind may have nothing to settle
        """Compile templates, check what keys say together. UserError naming the key."""

    def check_direction(self, args: ModelArgs) -> None:
        """UserError where it asks for what the tokens of the model see."""
        if not (args.causal or self.of_whole_texts):
            raise UserError(
                f"{self.file}: asks what follows a text, and the tokens of this model see what follows "
                f"(model.causal=false); kind prediction alone can be asked of it"
            )

    def meet(self, head: Head | None) -> None:  # noqa: B027 - most kinds need no head
        """Settle what depends on what the model predicts; None: nothing. UserError where they do not go together."""

    @abstractmethod
    def metric(self, name: str) -> Metric | None:
        """How a metric is computed; None where the kind has none of that name."""

    @abstractmethod
    def possible(self) -> str:
        """The metrics of the kind, for messages."""

    @abstractmethod
    def document(self, row: EvalRow, asked: Asked, setting: Setting) -> Document:
        """What is asked of a row. UserError saying what is wrong with it."""

    @abstractmethod
    def measure(self, document: Document, answers: Sequence[Answer]) -> Measures:
        """What the answers to a document's requests are worth: its metrics, and what is summed for others."""

    def example(self, row: EvalRow) -> Example:
        """A row as an example for others. UserError saying what is wrong with it."""
        raise UserError(f"kind {self.kind} has no examples")

    def documents(
        self,
        encoder: Encoder,
        chat: ChatTemplate | None = None,
        pictures: Pictures | None = None,
        head: Head | None = None,
    ) -> list[Document]:
        """What is asked of a model, in the order of the rows. UserError naming file and row of the first that is wrong.
        """
        setting = Setting(encoder, chat, pictures, head)
        self.meet(head)
        rows, self.partial = self.read()
        if not rows:
            raise UserError(f"{self.file}: data.path: has no rows")
        found = []
        for row in rows:
            with self._naming(row):
                asked = Asked(setting, self._description(), self._shots(row), self._delimiter())
                found.append(self.document(row, asked, setting))
        return found

    def read(self) -> tuple[list[EvalRow], bool]:
        """The rows that become documents, and whether `limit` left some out."""
        return self.rows.read(self.options.limit)

    def result(self, documents: Sequence[Document], measures: Sequence[Measures]) -> dict[str, Any]:
        """Metrics with standard errors, what was counted, and what the numbers depend on."""
        found: dict[str, Any] = {}
        for name in self.metrics:
            metric = self.metric(name)
            assert metric is not None
            found[name], found[f"{name}_stderr"] = computed(name, metric, measures)
        found |= {"n": len(documents), **self.more(documents, measures)}
        names = dict.fromkeys(name for document in documents for name in document.counts)
        found |= {name: sum(document.counts.get(name, 0) for document in documents) for name in names}
        if self.partial:
            found["partial"] = True
        found |= {"kind": self.kind, "version": self.version, "task_digest": self.digest}
        asked = {key: getattr(self.config, key, None) for key in ASKED_BY}
        found |= {key: as_json(value) for key, value in asked.items() if value}
        if isinstance(self.config, FewshotConfig):
            found |= {"num_fewshot": self.k, **({"fewshot_seed": self.config.fewshot.seed} if self.k else {})}
        return found

    def more(self, documents: Sequence[Document], measures: Sequence[Measures]) -> dict[str, Any]:
        """What else a kind reports."""
        return {}

    def sample(self, document: Document, answers: Sequence[Answer], measures: Measures) -> dict[str, Any]:
        """A document's line of the samples, in values of JSON."""
        line: dict[str, Any] = {
            "number": document.number,
            "doc": document.doc,
            "prompt": document.prompt,
            "responses": [
                response(request, text, answer)
                for request, text, answer in zip(document.requests, document.asked, answers, strict=True)
            ],
            "gold": as_json(document.gold),
            "metrics": {name: as_json(measures[name]) for name in self.metrics if name in measures},
        }
        return line | {name: True for name, count in document.counts.items() if count}

    def _found(self, paths: Sequence[str], key: str) -> list[Path]:
        return found_paths(paths, key, self.file, self.options.data_dirs)

    def _description(self) -> str:
        return self.config.description if isinstance(self.config, AskingConfig) else ""

    def _delimiter(self) -> str:
        return self.config.fewshot.delimiter if isinstance(self.config, FewshotConfig) else ""

    def _shots(self, row: EvalRow) -> list[Example]:
        """The examples before a row: drawn from the seed and its number alone, never itself."""
        if not self.k:
            return []
        assert isinstance(self.config, FewshotConfig)
        shots = self.config.fewshot
        if self._examples is None:
            self._examples = (self.examples or self.rows).read()[0]
        pool = self._examples
        own = self.examples is None
        possible = len(pool) - own
        if possible < self.k:
            raise UserError(f"fewshot.k={self.k}: there are {possible:,} rows to take examples from")
        if shots.draw == "first":
            taken = [other for other in pool[: self.k + 1] if not (own and other.number == row.number)][: self.k]
        else:
            draw = np.random.default_rng([shots.seed, row.number])
            places = draw.choice(possible, size=self.k, replace=False).tolist()
            taken = [pool[place + (own and place >= row.number - 1)] for place in places]
        for other in taken:
            if other.number not in self._made:
                with self._naming(other):
                    self._made[other.number] = self.example(other)
        return [self._made[other.number] for other in taken]

    def template(self, source: str, key: str) -> Template:
        """One of the task's templates. UserError naming its key."""
        return Template(source, key)

    def _digest(self) -> str:
        said = self.config.model_dump(mode="json", exclude={"data": {"path"}, "fewshot": True})
        shots = None
        if isinstance(self.config, FewshotConfig) and self.k:
            shots = self.config.fewshot.model_dump(mode="json", exclude={"path", "k"}) | {"k": self.k}
        files = [rows.digest() for rows in (self.rows, self.examples) if rows is not None]
        return digest_of(VERSION, said, shots, files)

    @contextmanager
    def _naming_file(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            raise UserError(f"{self.file}: {error}") from None

    @contextmanager
    def _naming(self, row: EvalRow) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            if str(error).startswith(f"task {self.name}: "):  # an example, which is named already
                raise
            raise UserError(f"task {self.name}: {row.place}: {error}") from None


def computed(name: str, metric: Metric, measures: Sequence[Measures]) -> tuple[float | None, float | None]:
    """A metric over documents, and its standard error; None where they are not defined."""
    if metric.of_rows is not None:
        rows = [[found[column] for column in metric.columns] for found in measures]
        table = np.array(rows, dtype=np.float64).reshape(-1, len(metric.columns))  # None becomes NaN
        whole = metric.of_rows(table)
        return whole, None if whole is None else bootstrap_of_rows(metric.of_rows, table)
    if metric.of_sums is None:
        values = [value for found in measures if (value := found[name]) is not None]
        return (float(np.mean(values)), mean_stderr(values)) if values else (None, None)
    kept = [[found[column] for column in metric.columns] for found in measures]
    columns = np.array([row for row in kept if None not in row], dtype=np.float64).reshape(-1, len(metric.columns))
    if not len(columns):
        return None, None
    with np.errstate(all="ignore"):
        value = float(metric.of_sums(np.array([columns[:, j].sum() for j in range(columns.shape[1])])))
    return (value, bootstrap_stderr(metric.of_sums, columns)) if np.isfinite(value) else (None, None)


def response(request: Request, text: str, answer: Answer) -> dict[str, Any]:
    """An answer as it stands in the samples."""
    if isinstance(answer, Scored):
        assert isinstance(request, Score)
        return {"text": text, "logprob": answer.logprob, "greedy": answer.greedy, "tokens": len(request.target)}
    assert isinstance(answer, Continued)
    return {"text": answer.text, "logprob": None, "greedy": None, "tokens": answer.tokens}
