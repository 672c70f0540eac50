"""report.html: what evaluations found, as one file that needs no other: tables with standard errors, pictures of the
documents' scores, the worst and best documents with prompts and answers; several models side by side, or the
checkpoints of a run against their steps.
"""

from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from llm.atomic import write_file
from llm.evaluate import charts, ranking
from llm.evaluate.documents_html import document_html, shown, text_html
from llm.evaluate.outputs import Output, Sample, facts_of, metrics_of, names_of
from llm.evaluate.results_md import counted, mark_of, rows_of, tasks_of, value_of

EACH = 5
"""Worst and best documents of a task that are shown."""


def write_report(
    outputs: Sequence[Path], file: Path, *, steps: Sequence[int] | None = None, image_roots: Sequence[Path] = ()
) -> None:
    """Write the report of finished evaluations. steps: of the checkpoints that they are of. image_roots: folders in
    which the images of documents are looked for. UserError where an output lacks its results.
    """
    write_file(file, page([Output.read(path) for path in outputs], steps, image_roots).encode(errors="replace"))


def page(outputs: Sequence[Output], steps: Sequence[int] | None = None, roots: Sequence[Path] = ()) -> str:
    """The report as HTML."""
    style = resources.files("llm.evaluate").joinpath("report.css").read_text(encoding="utf-8")
    names, tasks = names_of(outputs, steps), tasks_of(outputs)
    title = "Evaluation" if len(outputs) > 1 or steps is not None else f"Evaluation of {names[0]}"
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body><h1>{escape(title)}</h1>"
    ]
    parts.append("<nav>" + "".join(f'<a href="#task-{i}">{shown(task)}</a>' for i, task in enumerate(tasks)) + "</nav>")
    if steps is not None:
        parts += _against_steps(outputs, steps)
    if steps is None:
        parts.append(_results(outputs, names))
    else:
        parts.append(_results_by_step(outputs, names))
        outputs, names = outputs[-1:], names[-1:]  # the documents of all checkpoints would be most of the page
    parts.append(_models(outputs, names))
    parts += [_task(i, task, outputs, names, roots) for i, task in enumerate(tasks)]
    return "".join([*parts, "</body></html>\n"])


def _against_steps(outputs: Sequence[Output], steps: Sequence[int]) -> list[str]:
    figures = []
    for task, metric in rows_of(outputs):
        points = []
        for step, output in zip(steps, outputs, strict=True):
            for name, value, error in metrics_of(output.results.get(task, {})):
                if name == metric and value is not None:
                    points.append((step, value, error))
        if points:
            x, y, error_of = zip(*points, strict=True)
            drawn = charts.curves([charts.Series(task, x, y, error_of)], "step", metric)
            figures.append(_figure(f"{task}: {metric}", drawn))
    note = '<p class="soft">The band is one standard error up and down.</p>'
    return ["<h2>Score against step</h2>", note, f'<div class="charts">{"".join(figures)}</div>']


def _results(outputs: Sequence[Output], names: Sequence[str]) -> str:
    keys = len(outputs) > 1
    heads = "".join(f'<th class="num">{_key(i) if keys else ""}{shown(name)}</th>' for i, name in enumerate(names))
    rows = [f"<tr><th>task</th><th>metric</th>{heads}<th></th><th class=num>n</th></tr>"]
    before = None
    for task, metric in rows_of(outputs):
        values = []
        for output in outputs:
            found = {name: (value, error) for name, value, error in metrics_of(output.results.get(task, {}))}
            values.append(found.get(metric, (None, None)))
        numbers = [value for value, _ in values if value is not None]
        best = (min if ranking.lower_is_better(metric) else max)(numbers, default=None)
        best = None if len(set(numbers)) == 1 else best
        cells = "".join(
            f'<td class="num{" best" if keys and value is not None and value == best else ""}">'
            f"{_with_error(value_of(output, task, metric))}</td>"
            for output, (value, _) in zip(outputs, values, strict=True)
        )
        name = f'<a href="#task-{tasks_of(outputs).index(task)}">{shown(task)}</a>{mark_of(outputs, task)}'
        rows.append(
            f"<tr><td>{'' if task == before else name}</td><td>{shown(metric)}</td>{cells}"
            f"<td>{charts.whiskers(values) if len(values) <= charts.COLOURS else ''}</td>"
            f'<td class="num">{"" if task == before else counted(outputs, task)}</td></tr>'
        )
        before = task
    note = "Value \u00b1 one standard error; the lines show two. n: documents."
    return _table_of_results(rows, note + _partial(outputs))


def _results_by_step(outputs: Sequence[Output], names: Sequence[str]) -> str:
    """The same with a line for each checkpoint."""
    every = rows_of(outputs)
    heads = "".join(f'<th class="num">{shown(task)}{mark_of(outputs, task)}<br>{shown(m)}</th>' for task, m in every)
    rows = [f"<tr><th></th>{heads}</tr>"]
    for output, name in zip(outputs, names, strict=True):
        cells = "".join(f'<td class="num">{_with_error(value_of(output, *row))}</td>' for row in every)
        rows.append(f"<tr><td>{shown(name)}</td>{cells}</tr>")
    return _table_of_results(rows, "Value \u00b1 one standard error." + _partial(outputs))


def _partial(outputs: Sequence[Output]) -> str:
    star = any(mark_of(outputs, task) for task in tasks_of(outputs))
    return " * partial: only the first documents were read (--limit)." if star else ""


def _table_of_results(rows: Sequence[str], note: str) -> str:
    table = f'<div class="scroll"><table>{"".join(rows)}</table></div>'
    return f'<h2>Results</h2><p class="soft">{note}</p>{table}'


def _with_error(cell: str) -> str:
    value, plus, error = cell.partition(" \u00b1 ")
    return f"<b>{value}</b>" + (f' <span class="err">\u00b1 {error}</span>' if plus else "")


def _key(place: int) -> str:
    return f'<span class="key c{place % charts.COLOURS}"></span>'


def _models(outputs: Sequence[Output], names: Sequence[str]) -> str:
    facts: dict[str, list[str]] = {}
    for i, output in enumerate(outputs):
        said = {"path": output.run.get("model"), **output.model}
        for key in ("time", "layout", "ranks", "device", "batch_tokens"):
            said[key] = output.run.get(key)
        hardware = output.run.get("hardware") or {}
        said["hardware"] = hardware.get("gpu") or hardware.get("processor")
        for key, value in said.items():
            facts.setdefault(key, [""] * len(outputs))[i] = "" if value is None else _fact(value)
    rows = ""
    for key, values in facts.items():
        if any(values):
            same = len(set(values)) == 1
            cells = [f'<td class="mono" colspan="{len(values)}">{values[0]}</td>'] if same else [
                f'<td class="mono">{value}</td>' for value in values
            ]  # fmt: skip
            rows += f"<tr><td>{shown(key.replace('_', ' '))}</td>{''.join(cells)}</tr>"
    head = f"<tr><th></th>{''.join(f'<th>{shown(name)}</th>' for name in names)}</tr>" if len(outputs) > 1 else ""
    return f'<h2>Model</h2><div class="scroll"><table class="facts">{head}{rows}</table></div>'


def _fact(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else shown(str(value))


def _task(place: int, task: str, outputs: Sequence[Output], names: Sequence[str], roots: Sequence[Path]) -> str:
    parts = [f'<h2 id="task-{place}">{shown(task)}</h2>']
    done = [(output, name) for output, name in zip(outputs, names, strict=True) if task in output.results]
    if not done:
        return "".join(parts)
    found = dict(facts_of(done[0][0].results[task]))
    template = found.pop("prompt", None)
    facts = ", ".join(f"{shown(key.replace('_', ' '))} {_fact(value)}" for key, value in found.items())
    parts.append(f'<p class="soft">{facts}</p>')
    if template is not None:
        parts.append(f'<details class="soft"><summary>prompt</summary>{text_html(str(template))}</details>')
    samples = [(output.samples(task), name) for output, name in done if output.has_samples(task)]
    samples = [(lines, name) for lines, name in samples if ranking.metrics_in(lines)]
    if not samples:
        return "".join(parts)
    metric = ranking.metrics_in(samples[0][0])[0]
    several = len(done) > 1
    figures = []
    for lines, name in samples:
        figures += _histograms(lines, metric, f"{name}: " if several else "")
    parts.append(f'<div class="charts">{"".join(figures)}</div>')
    for lines, name in samples[1:]:
        parts += _differences(samples[0], (lines, name), metric, roots)
    for lines, name in samples:
        listed = _worst_and_best(lines, metric, roots)
        parts.append(f"<details><summary>documents of {shown(name)}</summary>{listed}</details>" if several else listed)
    return "".join(parts)


def _histograms(samples: Sequence[Sample], metric: str, title: str) -> list[str]:
    figures = []
    for name in ranking.metrics_in(samples):
        label, values = ranking.comparable(samples, name)
        there = values[np.isfinite(values)]
        if len(np.unique(there)) > 1 and not ranking.is_binary(values):
            figures.append(_figure(f"{title}{label} of each document", charts.histogram([("", there)], label)))
    sure, values = ranking.sureness(samples), ranking.column(samples, metric)
    if sure is not None:
        label, by = sure
        known = np.isfinite(by) & ~np.isnan(values)
        if len(np.unique(by[known])) < 2:
            return figures
        if ranking.is_binary(values):
            groups = [(f"{metric} 1", by[known & (values == 1)]), (f"{metric} 0", by[known & (values == 0)])]
            key = "".join(
                f'<span class="key h{i}"></span>{shown(of)} ({len(group):,})' for i, (of, group) in enumerate(groups)
            )
            figures.append(_figure(f"{title}right and wrong", charts.histogram(groups, label), key))
        else:
            figures.append(_figure(f"{title}{label}", charts.histogram([("", by[known])], label)))
    return figures


def _figure(title: str, drawn: str, key: str = "") -> str:
    under = f'<div class="soft">{key}</div>' if key else ""
    return f"<figure><figcaption>{shown(title)}</figcaption>{drawn}{under}</figure>"


def _worst_and_best(samples: Sequence[Sample], metric: str, roots: Sequence[Path]) -> str:
    worst, best = ranking.worst_and_best(samples, metric, EACH)
    parts = []
    for title, places in (("Worst", worst), ("Best", best)):
        if places:
            shown_as = "".join(document_html(i + 1, samples[i], roots) for i in places)
            parts.append(f"<h3>{title} documents by {shown(metric)}</h3>{shown_as}")
    return "".join(parts)


def _differences(
    first: tuple[list[Sample], str], second: tuple[list[Sample], str], metric: str, roots: Sequence[Path]
) -> list[str]:
    places = ranking.most_different(first[0], second[0], metric, EACH)
    if not places:
        return []
    pairs = "".join(
        document_html(i + 1, samples[i], roots, f"{name}:") for i in places for samples, name in (first, second)
    )
    title = f"where {shown(first[1])} and {shown(second[1])} differ most in {shown(metric)}"
    return [f"<details><summary>{title}</summary>{pairs}</details>"]
