"""An evaluation from tasks to results, on all ranks: what is asked, whether it has been answered, the model if it has
not, and the files that say what came out.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from llm.args import ModelArgs
from llm.checkpoint.lock import run_lock
from llm.checkpoint.reader import STEP_FOLDER, Checkpoint
from llm.errors import UserError
from llm.evaluate.answer import Asked, answer, answered, collected
from llm.evaluate.encode import Encoder
from llm.evaluate.fingerprint import compared
from llm.evaluate.journal import Journal
from llm.evaluate.loading import files_digest, model_digest, open_replica
from llm.evaluate.report import write_report
from llm.evaluate.requests import Answer, NonFinite, Request
from llm.evaluate.results import write_results, write_run, write_samples
from llm.evaluate.results_md import write_markdown
from llm.evaluate.runner import Runner
from llm.evaluate.tasks import Document, EvalTask, Group, TaskOptions, open_tasks
from llm.evaluate.tasks.asked import Head
from llm.evaluate.tasks.config import digest_of
from llm.generation.device import Dtype, dtype_for
from llm.generation.pictures import Pictures
from llm.generation.text import context_length
from llm.parallel.collectives import all_or_none, main_decides
from llm.parallel.grid import Grid
from llm.parallel.layout import Layout
from llm.parameters import ParameterTable
from llm.pretrained import args_of, chat_template_of, log_note, tokenizer_of
from llm.tokenizer import Tokenizer
from llm.tokenizers.chat import ChatTemplate
from vision.opening import LIMITS


@dataclass(frozen=True)
class Settings:
    """What is evaluated, and how fast."""

    model: Path
    tasks: tuple[str, ...]
    """paths of YAML files, or names of those in configs/evaluate"""
    output: Path
    options: TaskOptions
    batch_tokens: int
    dtype: Dtype
    average: bool
    chat_template: str | None
    """None = prompts are plain text"""
    every_checkpoint: bool = False
    """of the run that the model is, each for itself"""


class Model:
    """What is known of a model before its weights are read."""

    def __init__(self, settings: Settings, quiet: bool) -> None:
        """quiet: without notes about its folder. UserError where it, its tokenizer or its chat template cannot be read.
        """
        path, notify = settings.model, None if quiet else log_note
        self.args: ModelArgs = args_of(path, notify)
        self.tokenizer: Tokenizer = tokenizer_of(path, notify)
        choice = settings.chat_template
        self.chat: ChatTemplate | None = None if choice is None else chat_template_of(path, self.tokenizer, choice)
        self.end_ids = self.tokenizer.end_ids if self.chat is None else self.chat.end_ids
        self.encoder = Encoder(self.tokenizer, context_length(self.args), self.args.encoder_layers > 0)
        self.head = Head.of(self.args)
        self.pictures = Pictures(self.args.vision, str(path), LIMITS)


@dataclass(frozen=True)
class Part:
    """A task, and where its requests stand among those of all."""

    task: EvalTask
    documents: Sequence[Document]
    first: int


@dataclass(frozen=True)
class Questions:
    """All that the tasks ask of a model."""

    model: Model
    parts: list[Part]
    groups: list[Group]
    asked: Asked

    def document_of(self, index: int) -> str:
        """Which document, for a message, first made a request of `asked`."""
        place = self.asked.places.index(index)
        part = max((part for part in self.parts if part.first <= place), key=lambda part: part.first)
        at = part.first
        for document in part.documents:
            at += len(document.requests)
            if place < at:
                return f"task {part.task.name}: {document.place}"
        raise AssertionError(f"no document made request {index}")


def questions(settings: Settings, quiet: bool) -> Questions:
    """What the tasks ask of the model; quiet: as of Model. UserError naming file and row where they cannot."""
    model, parts = Model(settings, quiet), []
    requests: list[Request] = []
    tasks, groups = open_tasks(settings.tasks, settings.options)
    for task in tasks:
        task.check_direction(model.args)
        documents = task.documents(model.encoder, model.chat, model.pictures, model.head)
        parts.append(Part(task, documents, len(requests)))
        requests += [request for document in documents for request in document.requests]
    return Questions(model, parts, groups, Asked.of(requests))


def checkpoints_of(run: Path) -> list[Path]:
    """The checkpoints of a run, by step. UserError where there are none, or one is damaged."""
    folder = run / "checkpoints" if (run / "checkpoints").is_dir() else run
    found = {int(name[1]): path for path in folder.glob("step_*") if (name := STEP_FOLDER.fullmatch(path.name))}
    if not found:
        raise UserError(f"--model={run}: holds no checkpoints; --every_checkpoint is for a run")
    for path in found.values():
        Checkpoint.open(path)
    return [found[step] for step in sorted(found)]


def evaluate(settings: Settings, grid: Grid) -> None:
    """Do the tasks, or go on with them, and write the results (collective)."""
    with run_lock(settings.output, grid.world):
        asking = all_or_none(lambda: questions(settings, quiet=not grid.world.is_main), grid.world)
        if not settings.every_checkpoint:
            evaluate_one(settings, asking, grid)
            main_decides(lambda: write_reports(settings, [settings.output]), grid.world)
            return
        paths = all_or_none(lambda: checkpoints_of(settings.model), grid.world)
        outputs = [settings.output / path.name for path in paths]
        for path, output in zip(paths, outputs, strict=True):
            evaluate_one(replace(settings, model=path, output=output), asking, grid)
        steps = [Checkpoint.open(path).step for path in paths]
        main_decides(lambda: write_reports(settings, outputs, steps), grid.world)


def evaluate_one(settings: Settings, asking: Questions, grid: Grid) -> None:
    """The same of one model, without the reports that may be of several (collective)."""
    started = time.monotonic()
    world, asked, model = grid.world, asking.asked, asking.model
    dtype = dtype_for(settings.model, settings.dtype, world.device)
    journal = Journal(settings.output)
    fixed = _identity(model, dtype, asking)
    files, digest = main_decides(lambda: _known(settings, journal, fixed), world)
    done = answered(asked, journal, grid)
    statistics: dict[str, float] = {}
    checked = "not read, as all answers were there"
    loaded = time.monotonic()
    if digest is None or len(done) < len(asked.requests):
        replica = open_replica(settings.model, grid, dtype, settings.average)
        digest = model_digest(replica)
        checked = "unchecked: averages have none"
        if not settings.average:
            checked = all_or_none(lambda: compared(settings.model, replica), world)
        main_decides(lambda: journal.open({"the model": digest, **fixed}, files, digest), world)
        runner = Runner(replica, model.tokenizer, settings.batch_tokens, model.end_ids, model.pictures)
        loaded = time.monotonic()
        try:
            answer(asked, done, runner, journal, grid, show=True)
        except NonFinite as error:
            failure = UserError(f"{asking.document_of(error.index)}: {error}; nothing is reported")
            failure.agreed = error.agreed
            raise failure from None
        statistics = runner.statistics()
    took = time.monotonic() - loaded

    def write() -> None:
        _write(settings.output, asking, collected(asked, journal), _identified(model, digest, dtype))
        facts = {
            "model": str(settings.model),
            "tasks": list(settings.tasks),
            "layout": described(grid.layout),
            "ranks": world.size,
            "threads": torch.get_num_threads(),
            "device": world.device.type,
            "fingerprint": checked,
            "batch_tokens": settings.batch_tokens,
            "seconds": {"all": round(time.monotonic() - started, 3), "answering": round(took, 3)},
            "requests": {
                "all": len(asked.places),
                "different": len(asked.requests),
                "in_the_journal": len(done),
                "answered": len(asked.requests) - len(done),
            },
            "speed": statistics,
        }
        write_run(settings.output, facts)

    main_decides(write, world)


def _identity(model: Model, dtype: torch.dtype, asking: Questions) -> dict[str, str]:
    """What decides the answers beside the weights, by the name that a message gives it."""
    found = {
        "--dtype": str(dtype).removeprefix("torch."),
        "its tokenizer": model.tokenizer.fingerprint,
        "the chat template": "none" if model.chat is None else model.chat.fingerprint,
    }
    if model.head is not None:
        keys = ("prediction_names", "prediction_mean", "prediction_std", "prediction_causal")
        found["its prediction head"] = digest_of({key: getattr(model.args, key) for key in keys})
    return found | {f"the task {part.task.name}": part.task.digest for part in asking.parts}


def _known(settings: Settings, journal: Journal, fixed: dict[str, str]) -> tuple[str, str | None]:
    """Digest of the model's files, and of the model where these files have been met in this output. UserError where the
    journal is of something else, as far as that can be seen without the weights."""
    files = files_digest(settings.model, settings.average) + " as " + fixed["--dtype"]
    digest = journal.models().get(files)
    journal.check(fixed if digest is None else {"the model": digest, **fixed})
    return files, digest


def described(layout: Layout) -> str:
    """A layout without what is of training alone."""
    return str(layout).removesuffix(f", ZeRO-{layout.zero_stage}")


def _identified(model: Model, digest: str, dtype: torch.dtype) -> dict[str, Any]:
    """What identifies the model in results.json."""
    found = {
        "digest": digest,
        "dtype": str(dtype).removeprefix("torch."),
        "tokenizer": model.tokenizer.fingerprint,
        "parameters": sum(map(prod, ParameterTable.of(model.args).shapes.values())),
        "context": context_length(model.args),
    }
    return found | ({} if model.chat is None else {"chat_template": model.chat.fingerprint})


def _write(output: Path, asking: Questions, answers: Sequence[Answer], model: dict[str, Any]) -> None:
    results = {}
    for task, documents, at in ((part.task, part.documents, part.first) for part in asking.parts):
        measures, samples = [], []
        for document in documents:
            own = answers[at : at + len(document.requests)]
            at += len(document.requests)
            measures.append(task.measure(document, own))
            samples.append(task.sample(document, own, measures[-1]))
        write_samples(output, task.name, samples)
        results[task.name] = task.result(documents, measures)
    results |= {group.name: group.result(results) for group in asking.groups}
    write_results(output, model, results)


def write_reports(settings: Settings, outputs: Sequence[Path], steps: Sequence[int] | None = None) -> None:
    """results.md, printed too, and report.html, of one model or of a run's checkpoints."""
    roots = [] if settings.options.image_root is None else [settings.options.image_root]
    write_markdown(outputs, settings.output / "results.md", steps=steps)
    write_report(outputs, settings.output / "report.html", steps=steps, image_roots=roots)
    print((settings.output / "results.md").read_text(), end="", flush=True)
