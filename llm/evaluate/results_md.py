"""results.md: the table of an evaluation for people, with standard errors; of several, side by side."""

import json
from collections.abc import Sequence
from pathlib import Path

from llm.atomic import write_file
from llm.evaluate.outputs import Output, facts_of, metrics_of, names_of


def write_markdown(outputs: Sequence[Path], file: Path, *, steps: Sequence[int] | None = None) -> None:
    """Write the results of finished evaluations as one file of Markdown. steps: of the checkpoints that they are of.
    UserError where an output lacks its results."""
    write_file(file, markdown([Output.read(path) for path in outputs], steps).encode(errors="replace"))


def markdown(outputs: Sequence[Output], steps: Sequence[int] | None = None) -> str:
    """The tables as text."""
    names = names_of(outputs, steps)
    lines = ["# Evaluation", ""]
    lines += _table(["", *_MODEL], [[name, *_described(output)] for name, output in zip(names, outputs, strict=True)])
    lines += ["", "## Results", "", "Value \u00b1 one standard error; n = documents.", ""]
    every = rows_of(outputs)
    if steps is None:
        head = ["task", "metric", *names, "n"]
        rows = [
            [task + mark_of(outputs, task), m, *(value_of(of, task, m) for of in outputs), counted(outputs, task)]
            for task, m in every
        ]
    else:
        head = ["", *(f"{task}{mark_of(outputs, task)} {metric}" for task, metric in every)]
        rows = [[name, *(value_of(of, *row) for row in every)] for name, of in zip(names, outputs, strict=True)]
    lines += _table(head, rows)
    if any(mark_of(outputs, task) for task in tasks_of(outputs)):
        lines += ["", "\\* partial: only the first documents were read (`--limit`)"]
    lines += ["", "## Tasks", ""]
    for task in tasks_of(outputs):
        facts = next(dict(facts_of(output.results[task])) for output in outputs if task in output.results)
        lines.append(f"- {_cell(task)}: " + ", ".join(f"{_cell(key)} {_fact(value)}" for key, value in facts.items()))
    return "\n".join(lines) + "\n"


_MODEL = ("model", "parameters", "dtype", "context", "digest", "tokenizer")


def _described(output: Output) -> list[object]:
    model = output.model
    parameters = model.get("parameters")
    return [
        output.run.get("model", "-"),
        f"{parameters:,}" if isinstance(parameters, int) else "-",
        *(str(model.get(key, "-"))[:16] for key in _MODEL[2:]),
    ]


def tasks_of(outputs: Sequence[Output]) -> list[str]:
    """All tasks that any of them has done, in the order in which they first come."""
    return list(dict.fromkeys(task for output in outputs for task in output.results))


def rows_of(outputs: Sequence[Output]) -> list[tuple[str, str]]:
    """(task, metric) of each row of a table."""
    return [
        (task, metric)
        for task in tasks_of(outputs)
        for metric in dict.fromkeys(
            name for output in outputs if task in output.results for name, *_ in metrics_of(output.results[task])
        )
    ]


def value_of(output: Output, task: str, metric: str) -> str:
    """A cell: the value and its standard error."""
    for name, value, error in metrics_of(output.results.get(task, {})):
        if name == metric and value is not None:
            return fixed(value) + ("" if error is None else f" \u00b1 {fixed(error)}")
    return "-"


def fixed(value: float) -> str:
    """A number for a table: four places, fewer of a large one."""
    if abs(value) < 1000:
        return f"{value:.4f}"
    return f"{value:,.1f}" if abs(value) < 1e8 else f"{value:.3e}"


def counted(outputs: Sequence[Output], task: str) -> str:
    """Documents of a task; of each evaluation where they differ."""
    counts = [output.results.get(task, {}).get("n") for output in outputs]
    shown = [f"{n:,}" if isinstance(n, int) else "-" for n in counts]
    return shown[0] if len(set(shown)) == 1 else " / ".join(shown)


def mark_of(outputs: Sequence[Output], task: str) -> str:
    """A star where not all documents of the task were read."""
    return "*" if any(output.results.get(task, {}).get("partial") for output in outputs) else ""


def _fact(value: object) -> str:
    is_prose = isinstance(value, str) and len(value.split()) > 1
    return _cell(json.dumps(value, ensure_ascii=False) if is_prose else value)


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(map(_cell, row)) + " |" for row in lines]


def _cell(value: object) -> str:
    """Text that ends no cell and starts no markup."""
    text = " ".join(str(value).split())
    for mark in "\\|*`<[":
        text = text.replace(mark, "\\" + mark)
    return text
