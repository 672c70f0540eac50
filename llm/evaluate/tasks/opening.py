"""Tasks by path or name, and groups of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from llm.errors import UserError
from llm.evaluate.tasks.base import EvalTask
from llm.evaluate.tasks.choice import ChoiceTask
from llm.evaluate.tasks.config import SHIPPED, Section, TaskOptions, checked, read_task_file
from llm.evaluate.tasks.generation import GenerationTask
from llm.evaluate.tasks.loglikelihood import LoglikelihoodTask
from llm.evaluate.tasks.perplexity import PerplexityTask
from llm.evaluate.tasks.predicted import PredictionTask
from llm.evaluate.tasks.vqa import VQATask

KINDS: dict[str, type[EvalTask]] = {
    task.kind: task
    for task in (ChoiceTask, LoglikelihoodTask, PerplexityTask, GenerationTask, VQATask, PredictionTask)
}
GROUP = "group"


class GroupConfig(Section):
    """A task file of kind group."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$", max_length=100)
    kind: str
    tasks: tuple[str, ...] = Field(min_length=1)
    """names or paths, relative to the file, then to the working directory; groups too"""


@dataclass(frozen=True)
class Group:
    """Tasks whose metrics are reported together."""

    name: str
    tasks: tuple[str, ...]
    """names of tasks, no groups"""

    def result(self, results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """The mean over its tasks, each counting once, of the metrics that all of them have, with its standard error:
        the tasks' own are independent."""
        of = [results[name] for name in self.tasks]
        found: dict[str, Any] = {}
        for metric in of[0]:
            errors = [one.get(f"{metric}_stderr") for one in of]
            values = [value for one in of if isinstance(value := one.get(metric), float)]
            if f"{metric}_stderr" in of[0] and len(values) == len(of):
                found[metric] = float(np.mean(values))
                whole = [error for error in errors if error is not None]
                known = len(whole) == len(of)
                found[f"{metric}_stderr"] = float(np.sqrt(np.sum(np.square(whole)))) / len(of) if known else None
        found |= {"n": sum(one["n"] for one in of), "tasks": list(self.tasks)}
        return found | ({"partial": True} if any(one.get("partial") for one in of) else {})


def open_task(name_or_path: str, options: TaskOptions | None = None) -> EvalTask:
    """A task by the path of its file, or by its name in configs/evaluate. UserError where there is none, it is a group,
    or it is wrong."""
    file = task_file(name_or_path)
    content = read_task_file(file)
    kind = content.get("kind")
    if kind == GROUP:
        raise UserError(f"{file}: is a group of tasks where one task must be; name one of {content.get('tasks')}")
    if not isinstance(kind, str) or kind not in KINDS:
        said = "missing key kind" if kind is None else f"kind={kind!r}: no such kind"
        raise UserError(f"{file}: {said}; possible are {', '.join([*KINDS, GROUP])}")
    return KINDS[kind](content, file, options or TaskOptions())


def open_tasks(names: Sequence[str], options: TaskOptions | None = None) -> tuple[list[EvalTask], list[Group]]:
    """Tasks, those of groups in their place, each once; and the groups. UserError as of `open_task`, and where two
    tasks or groups have one name."""
    tasks: dict[Path, EvalTask] = {}
    groups: list[Group] = []
    for name in names:
        _open(task_file(name), options or TaskOptions(), tasks, groups, ())
    seen: dict[str, str] = {}
    named = [(str(file), task.name) for file, task in tasks.items()] + [("a group", group.name) for group in groups]
    for place, called in named:
        if called in seen:
            raise UserError(f"two tasks are called {called}: {seen[called]} and {place}; results go by names")
        seen[called] = place
    return list(tasks.values()), groups


def _open(
    file: Path, options: TaskOptions, tasks: dict[Path, EvalTask], groups: list[Group], above: tuple[Path, ...]
) -> list[str]:
    """Open a task or group; names of its tasks."""
    key = file.resolve()
    if key in tasks:
        return [tasks[key].name]
    content = read_task_file(file)
    if content.get("kind") != GROUP:
        tasks[key] = open_task(str(file), options)
        return [tasks[key].name]
    if key in above:
        raise UserError(f"{file}: is a group that holds itself")
    config = checked(content, GroupConfig, file)
    inner: list[str] = []
    for name in config.tasks:
        beside = file.parent / name
        place = beside if beside.is_file() else task_file(name)
        inner += _open(place, options, tasks, groups, (*above, key))
    group = Group(config.name, tuple(dict.fromkeys(inner)))
    if group not in groups:
        groups.append(group)
    return inner


def task_file(name_or_path: str) -> Path:
    """The file of a task. UserError naming those that there are."""
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    shipped = SHIPPED / f"{name_or_path}.yaml"
    if path.name == name_or_path and shipped.is_file():
        return shipped
    if path.suffix in (".yaml", ".yml") or path.name != name_or_path:
        raise UserError(f"{name_or_path}: no such task file")
    names = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.yaml"))) or "none"
    raise UserError(f"unknown task {name_or_path!r}: neither a file nor one of configs/evaluate ({names})")
