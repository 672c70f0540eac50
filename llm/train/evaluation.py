"""Tasks in the course of a training (`eval.tasks`): the model is evaluated as it stands, on the ranks and in the layout
of the training, with the tasks and the runner of launch/evaluate.py.

Everything a task asks is known, and what is wrong with it refused, before the run starts. An evaluation reads the
weights and changes nothing: the steps after it are those of a run without.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llm.data.heldout import HeldOut
from llm.errors import UserError
from llm.evaluate.answer import Asked
from llm.evaluate.encode import Encoder
from llm.evaluate.requests import Answer, NonFinite, Request, as_json, digest, from_json
from llm.evaluate.runner import Runner
from llm.evaluate.tasks import Document, EvalTask, Group, Measures, TaskOptions, open_tasks
from llm.evaluate.tasks.asked import Head
from llm.evaluate.tasks.metrics import LOWER_IS_BETTER
from llm.generation.pictures import Pictures
from llm.generation.text import context_length
from llm.parallel.collectives import all_or_none, gather_json, sum_over_ranks
from llm.parallel.replica import Replica
from llm.tasks import Task
from llm.tokenizer import Tokenizer
from llm.tokenizers.chat import ChatTemplate
from llm.train.best import Followed
from llm.train.config import RunConfig
from llm.train.config.outputs import higher_is_better, is_of_validation, metric_of_task

DOCUMENTS_AT_ONCE = 128
"""Between two looks at whether the run is to stop. A fixed number, so that what is computed together does not depend on
the layout."""


@dataclass(frozen=True)
class OpenTask:
    """A task of a run, with what it asks of each document."""

    task: EvalTask
    documents: Sequence[Document]

    @property
    def requests(self) -> list[Request]:
        return [request for document in self.documents for request in document.requests]


@dataclass(frozen=True)
class Together:
    """What one name stands for: a task, or the tasks of a group."""

    name: str
    parts: Sequence[OpenTask]

    @property
    def metrics(self) -> tuple[str, ...]:
        """Those that all of them have."""
        return tuple(m for m in self.parts[0].task.metrics if all(m in part.task.metrics for part in self.parts))

    @property
    def n_rows(self) -> int:
        return sum(len(part.documents) for part in self.parts)

    @property
    def fingerprint(self) -> str:
        """Of the tasks and all that they ask."""
        said = [[part.task.digest, *map(digest, part.requests)] for part in self.parts]
        return hashlib.blake2b(json.dumps(said).encode(), digest_size=16).hexdigest()

    def described(self) -> str:
        requests = sum(len(part.requests) for part in self.parts)
        return f"{self.n_rows:,} documents of {self.name} ({requests:,} requests)"


@dataclass(frozen=True)
class RunTasks:
    """The tasks of a run, and the groups by which they are named."""

    opened: Sequence[OpenTask]
    groups: Sequence[Group]

    def named(self) -> dict[str, Together]:
        """All tasks and groups by name."""
        tasks = {opened.task.name: opened for opened in self.opened}
        groups = {group.name: [tasks[name] for name in group.tasks] for group in self.groups}
        return {name: Together(name, parts) for name, parts in ({n: [t] for n, t in tasks.items()} | groups).items()}


def open_run_tasks(
    config: RunConfig, tokenizer: Tokenizer, template: ChatTemplate | None, names_known: bool = True
) -> RunTasks:
    """What `eval.tasks` of a config whose vocabulary is settled asks. UserError naming the key or the task's file and
    row where it cannot be asked, and where eval.best is a metric that the task has not. names_known: the names of
    classes have been learned, where the model has some.
    """
    given = config.eval
    if given.apply_chat_template and given.tasks and template is None:
        raise UserError(
            "eval.apply_chat_template=true: the run writes no conversations, so it has no chat template; "
            "leave it out, or set chat.template"
        )
    root = config.data.images.root
    options = TaskOptions(limit=given.tasks_limit, image_root=None if root is None else Path(root))
    try:
        tasks, groups = open_tasks(given.tasks, options)
    except UserError as error:
        raise UserError(f"eval.tasks: {error}") from None
    head = Head.of(config.model, names_known)
    for task in tasks:
        task.meet(head)
        task.check_direction(config.model)
    unread = RunTasks([OpenTask(task, ()) for task in tasks], groups)
    if not is_of_validation(given.best):
        _check_best(given.best, unread.named())
    encoder = Encoder(tokenizer, context_length(config.model), config.model.encoder_layers > 0)
    chat = template if given.apply_chat_template else None
    pictures = _pictures(config)
    return RunTasks([OpenTask(task, task.documents(encoder, chat, pictures, head)) for task in tasks], groups)


def _check_best(best: str, named: Mapping[str, Together]) -> None:
    name, metric = metric_of_task(best)
    if name not in named:
        raise UserError(f"eval.best={best}: no task of eval.tasks is called {name}; there are {', '.join(named)}")
    if metric not in named[name].metrics:
        raise UserError(f"eval.best={best}: {name} has no metric {metric}; it has {', '.join(named[name].metrics)}")


def followed_in(config: RunConfig, held_out: HeldOut | None, tasks: RunTasks) -> Followed | None:
    """What checkpoint.keep_best and eval.patience go by; None where nothing is measured."""
    best, mode = config.eval.best, config.eval.best_mode
    higher = None if mode is None else mode == "max"
    if is_of_validation(best):
        rising = bool(higher_is_better(best) if higher is None else higher)
        return None if held_out is None else Followed(best, rising, held_out)
    name, metric = metric_of_task(best)
    return Followed(best, metric not in LOWER_IS_BETTER if higher is None else higher, tasks.named()[name])


def check_best_of_validation(config: RunConfig, task: Task) -> None:
    """UserError where eval.best is of a validation, and that of this task says nothing of the kind. The model has its
    vocabulary.
    """
    best, fields = config.eval.best, task.fields(config.model)
    if fields is None or not is_of_validation(best):
        return
    possible = [f"valid_{name}" for name in (*fields, *["loss_ema"] * (config.optim.ema_decay is not None))]
    if best not in possible:
        raise UserError(f"eval.best={best}: a validation of this run says {', '.join(possible)}")


def evaluate(
    replica: Replica,
    tasks: RunTasks,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    config: RunConfig,
    to_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float | None] | None:
    """Fields of metrics.jsonl with what the tasks say of the present weights, `eval/TASK/METRIC` and its standard error
    (collective). Equal on every layout but for the rounding of its sums.

    None when `to_stop` came true on any rank meanwhile, as of a validation. UserError where the model's numbers are not
    finite.
    """
    chat = template if config.eval.apply_chat_template else None
    end_ids = tokenizer.end_ids if chat is None else chat.end_ids
    most = max(config.train.micro_batch_size * config.train.seq_len, context_length(config.model))
    runner = Runner(replica, tokenizer, most, end_ids, _pictures(config))
    results: dict[str, dict[str, Any]] = {}
    for opened in tasks.opened:
        measures: list[Measures] = []
        for start in range(0, len(opened.documents), DOCUMENTS_AT_ONCE):
            if sum_over_ranks([to_stop()], replica.world)[0]:
                return None
            part = OpenTask(opened.task, opened.documents[start : start + DOCUMENTS_AT_ONCE])
            answers = iter(_answers(runner, replica, part))
            for document in part.documents:
                measures.append(opened.task.measure(document, [next(answers) for _ in document.requests]))
        results[opened.task.name] = opened.task.result(opened.documents, measures)
    results |= {group.name: group.result(results) for group in tasks.groups}
    return {
        f"eval/{name}/{field}": results[name][field]
        for name, together in tasks.named().items()
        for metric in together.metrics
        for field in (metric, f"{metric}_stderr")
        if field in results[name]
    }


def _answers(runner: Runner, replica: Replica, part: OpenTask) -> list[Answer]:
    """An answer for each request of the documents, on all ranks (collective)."""
    asked = Asked.of(part.requests)
    mine = all_or_none(partial(_of_this_replica, runner, asked.requests, part), replica.world)
    known: dict[int, Answer] = {}
    for found in gather_json([[i, as_json(answer)] for i, answer in mine], replica.world):
        known |= {i: from_json(answer) for i, answer in found}
    return [known[place] for place in asked.places]


def _of_this_replica(runner: Runner, requests: Sequence[Request], part: OpenTask) -> list[tuple[int, Answer]]:
    try:
        return [pair for batch in runner.answers(requests, frozenset()) for pair in batch]
    except NonFinite as error:
        key = digest(requests[error.index])
        document = next(of for of in part.documents if key in map(digest, of.requests))
        raise UserError(
            f"eval.tasks: task {part.task.name}: {document.place}: {error}; the last checkpoint is intact"
        ) from None


def _pictures(config: RunConfig) -> Pictures:
    return Pictures(config.model.vision, "the model", config.data.images.limits)


def opening_lines(config: RunConfig, tasks: RunTasks) -> Iterator[str]:
    """What a run says of its tasks when it begins, and --dry_run."""
    if not tasks.opened:
        return
    asked = ", ".join(Together(opened.task.name, [opened]).described() for opened in tasks.opened)
    yield f"every {config.eval.interval_of_tasks} steps the model is evaluated on {asked}"
    for opened in tasks.opened:
        counts = Counter(name for document in opened.documents for name, n in document.counts.items() if n)
        if counts:
            yield f"{opened.task.name}: {', '.join(f'{n:,} documents {name}' for name, n in counts.items())}"
