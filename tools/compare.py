"""How far two evaluations differ: `python tools/compare.py DIR_A DIR_B [--html FILE]` over the outputs of
launch/evaluate.py.

Both models have answered the same documents, so they are compared document by document: the mean difference (B less A)
with its standard error, a 95% interval by bootstrap, and the probability of a difference as large where neither is
better. Of perplexities the logarithms are compared. Tasks or documents that are not the same are refused.
"""

import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from llm.cli import run_cli
from llm.errors import UserError
from llm.evaluate.outputs import Output, Sample
from llm.evaluate.paired import Paired, paired
from llm.evaluate.ranking import comparable, metrics_in
from llm.evaluate.report import write_report
from llm.evaluate.results_md import fixed
from llm.paths import PathText

OF_A_TASK = ("kind", "version", "task_digest", "n", "num_fewshot", "fewshot_seed", "partial")
"""What two results of one task have in common, where it was done the same way."""


def compare(a: Output, b: Output) -> tuple[dict[str, dict[str, Paired]], list[str]]:
    """Differences of each metric of each task, and lines about metrics that cannot be compared. UserError where the
    tasks or their documents are not the same."""
    for task in sorted({*a.results} ^ {*b.results}):
        have, lack = (a, b) if task in a.results else (b, a)
        raise UserError(f"{lack.folder} has no results of task {task}, which {have.folder} has")
    found: dict[str, dict[str, Paired]] = {}
    notes = []
    for task in a.results:
        first, second = _same_documents(task, a, b)
        found[task] = {}
        for metric in dict.fromkeys([*metrics_in(first), *metrics_in(second)]):
            try:
                name, numbers = comparable(first, metric)
                found[task][name] = paired(numbers, comparable(second, metric)[1])
            except ValueError as error:
                notes.append(f"{task}: {metric} is not compared: {error}")
    return found, notes


def _same_documents(task: str, a: Output, b: Output) -> tuple[list[Sample], list[Sample]]:
    for key in OF_A_TASK:
        left, right = a.results[task].get(key), b.results[task].get(key)
        if left != right:
            raise UserError(f"task {task}: {key} is {left} in {a.folder} and {right} in {b.folder}")
    first, second = a.samples(task), b.samples(task)
    if len(first) != len(second):
        raise UserError(f"task {task}: {len(first)} documents in {a.folder} and {len(second)} in {b.folder}")
    for number, (one, other) in enumerate(zip(first, second, strict=True), 1):
        if one.get("doc") != other.get("doc"):
            raise UserError(f"task {task}: document {number} is another one in {b.folder} than in {a.folder}")
    return first, second


def lines(found: Mapping[str, Mapping[str, Paired]]) -> Iterator[str]:
    """The comparison as a table to read."""
    rows = [("task", "metric", "n", "A", "B", "B - A", "stderr", "95% interval", "p", "higher", "lower")]
    for task, metrics in found.items():
        for metric, of in metrics.items():
            low, high = of.interval
            stderr = "-" if math.isnan(of.stderr) else f"{of.stderr:.4f}"
            numbers = (fixed(of.first), fixed(of.second), f"{of.difference:+.4f}", stderr)
            interval = f"{low:+.4f} to {high:+.4f}" if of.n > 1 else "-"
            rows.append((task, metric, f"{of.n:,}", *numbers, interval, _p(of.p), str(of.better), str(of.worse)))
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    for row in rows:
        left = [cell.ljust(width) for cell, width in zip(row[:2], widths, strict=False)]
        right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        yield "  ".join([*left, *right]).rstrip()


def _p(value: float) -> str:
    return f"{value:.4f}" if value >= 0.0001 else "<0.0001"


def main(a: PathText, b: PathText, *, html: PathText | None = None, image_root: PathText | None = None) -> None:
    """Compare two evaluations of the same tasks, document by document.

    a, b: outputs of launch/evaluate.py
    html: also write a report of both, side by side, to this file
    image_root: folder of the images that the report is to show
    """
    outputs = [Output.read(Path(path)) for path in (a, b)]
    found, notes = compare(outputs[0], outputs[1])
    if html is not None:
        roots = [] if image_root is None else [Path(image_root)]
        write_report([Path(a), Path(b)], Path(html), image_roots=roots)
    for line in [*lines(found), *notes]:
        print(line)


if __name__ == "__main__":
    run_cli(main)
