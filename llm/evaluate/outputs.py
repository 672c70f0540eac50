"""The written outputs of evaluations, as reports and comparisons read them: results.json and samples/TASK.jsonl."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm.errors import UserError

Sample = dict[str, Any]
"""A line of samples/TASK.jsonl: doc, prompt, responses, metrics."""
STDERR = "_stderr"


@dataclass(frozen=True)
class Output:
    """What one evaluation has written."""

    folder: Path
    model: Mapping[str, Any]
    results: Mapping[str, Mapping[str, Any]]
    """by task"""
    run: Mapping[str, Any]
    """run.json: times and hardware; empty where there is none"""

    @classmethod
    def read(cls, folder: Path) -> "Output":
        """UserError where the folder has no results, or they are damaged."""
        file = folder / "results.json"
        if not file.is_file():
            raise UserError(f"{folder}: no results.json; give the --output of a finished evaluation")
        found = _json(_text(file), str(file))
        if not isinstance(found.get("results"), dict):
            raise UserError(f"{file}: no results in it")
        run = folder / "run.json"
        said = _json(_text(run), str(run)) if run.is_file() else {}
        return cls(folder, found.get("model") or {}, found["results"], said)

    def samples(self, task: str) -> list[Sample]:
        """The documents of a task, in order. UserError naming the line that is damaged, or that there are none."""
        file = self.folder / "samples" / f"{task}.jsonl"
        if not file.is_file():
            raise UserError(f"{file}: no such file; the evaluation has not finished")
        lines = _text(file).split("\n")
        return [_json(line, f"{file}: line {number}") for number, line in enumerate(lines, 1) if line]

    def has_samples(self, task: str) -> bool:
        return (self.folder / "samples" / f"{task}.jsonl").is_file()


def metrics_of(result: Mapping[str, Any]) -> Iterator[tuple[str, float | None, float | None]]:
    """Each metric of a task's result, its value and its standard error; None where there is none."""
    for name, value in result.items():
        if name.endswith(STDERR) or isinstance(value, bool):
            continue
        error = result.get(name + STDERR)
        if f"{name}{STDERR}" in result or isinstance(value, float):
            yield name, value, error


def facts_of(result: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The rest of a task's result: counts, versions, digests."""
    metrics = {name for name, *_ in metrics_of(result)}
    for name, value in result.items():
        if name not in metrics and not name.endswith(STDERR):
            yield name, value


def names_of(outputs: Sequence[Output], steps: Sequence[int] | None = None) -> list[str]:
    """What to call evaluations that stand side by side: the step, or as much of the path as distinguishes them."""
    if steps is not None:
        return [f"step {step:,}" for step in steps]
    paths = [Path(str(output.run.get("model") or output.folder)).parts for output in outputs]
    if len(set(paths)) < len(paths):
        paths = [output.folder.resolve().parts for output in outputs]
    for n in range(1, max(map(len, paths), default=1) + 1):
        short = ["/".join(parts[-n:]) for parts in paths]
        if len(set(short)) == len(short):
            return short
    return ["/".join(parts) for parts in paths]


def _text(file: Path) -> str:
    return file.read_bytes().decode(errors="surrogatepass")  # half a character of a document stands as it is


def _json(text: str, name: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UserError(f"{name}: no JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{name}: expected an object")
    return found
