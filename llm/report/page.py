"""The page: what is known of one run, or of several side by side. Whatever a run has written is escaped: texts of
samples, values of a config, names of runs, lines of a log.
"""

import json
import math
from collections.abc import Callable, Sequence
from html import escape
from importlib import resources
from typing import Any

from llm.evaluate.documents_html import shown, text_html
from llm.report import charts, experts, layout
from llm.report.facts import config_keys, data_rows, summary
from llm.report.folder import RunFolder, Sample

MOST_EVENTS = 300
MOST_SAMPLES = 48
LONGEST_SAMPLE = 3000
"""Characters of a sample that are kept."""


def page(runs: Sequence[RunFolder], script: str, pixels: int) -> str:
    """The HTML. script: plotly.js. pixels: how many a curve is thinned to; maps get fewer columns in the same way."""
    several = len(runs) > 1
    title = f"{len(runs)} runs compared" if several else f"Run {runs[0].name}"
    drawn: list[dict[str, object]] = []
    maps: list[dict[str, object]] = []
    parts: list[tuple[str, str]] = []
    for name, of_section in charts.sections(runs):
        figures = []
        for chart in of_section:
            figures.append(_figure(len(drawn), chart, several))
            drawn.append(chart.to_json(pixels))
        if name == charts.LOADS:
            figures += _maps(runs, maps, pixels)
        parts.append((name, f'<div class="charts">{"".join(figures)}</div>'))
    parts += [(name, made) for name, made in (
        ("Samples", _samples(runs)),
        ("Layout", _of_each(runs, _layout)),
        ("Data", _of_each(runs, _data)),
        ("Events", _of_each(runs, _events)),
        ("Config", _config(runs)),
    ) if made]  # fmt: skip
    links = " ".join(f'<a href="#{_anchor(name)}">{name}</a>' for name, _ in parts)
    body = "".join(f'<h2 id="{_anchor(name)}">{name}</h2>{made}' for name, made in parts)
    data = json.dumps({"charts": drawn, "maps": maps}, separators=(",", ":")).replace("<", "\\u003c")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" '
        f'content="light dark"><title>{shown(title)}</title><style>{_style()}</style></head><body>'
        f"<h1>{shown(title)}</h1>{_summary(runs)}{_damaged(runs)}<nav>{links}</nav>"
        "<noscript><p>Curves are drawn by JavaScript, which is off; tables and texts are below.</p></noscript>"
        f'{body}<script type="application/json" id="page-data">{data}</script>'
        f"<script>{script}</script><script>{_file('llm.report', 'page.js')}</script></body></html>\n"
    )


def _style() -> str:
    return _file("llm.evaluate", "report.css") + _file("llm.report", "page.css")


def _file(package: str, name: str) -> str:
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def _figure(number: int, chart: charts.Chart, several: bool) -> str:
    """The frame of a chart; its legend stands under it as text, which wraps on a narrow screen."""
    unit = f' <span class="unit">{shown(chart.unit)}</span>' if chart.unit else ""
    keys = [
        f'<span><span class="key c{curve.colour % charts.COLOURS}"></span>{shown(curve.name)}</span>'
        for curve in chart.curves
        if len(chart.curves) > 1 or several
    ]
    marks = sorted({kind for _, kind in chart.marks})
    keys += [f"<span>dotted: {shown(', '.join(marks))}</span>"] if marks else []
    legend = f'<div class="legend">{"".join(keys)}</div>' if keys else ""
    log = f'<button type="button" aria-pressed="{str(chart.log).lower()}">log</button>'
    return (
        f'<figure class="plot" data-chart="{number}"><figcaption><span>{shown(chart.title)}{unit}</span>{log}'
        f'</figcaption><div class="draw"></div>{legend}</figure>'
    )


def _maps(runs: Sequence[RunFolder], maps: list[dict[str, object]], pixels: int) -> list[str]:
    figures = []
    for run in runs:
        found = experts.load_map(run, f"{run.name}: " if len(runs) > 1 else "")
        if found is not None:
            figures.append(
                f'<figure class="plot wide" data-map="{len(maps)}"><figcaption><span>{shown(found.title)} '
                '<span class="unit">of an even share</span></span></figcaption><div class="draw map"></div></figure>'
            )
            maps.append(found.to_json(experts.MOST_CELLS * pixels // 600 // len(runs)))
    return figures


def _summary(runs: Sequence[RunFolder]) -> str:
    facts = [summary(run) for run in runs]
    if len(runs) == 1:
        tiles = "".join(f'<div class="tile"><span class="soft">{shown(k)}</span><b>{shown(v)}</b></div>'
                        for k, v in facts[0].items())  # fmt: skip
        return f'<p class="soft sure">{shown(str(runs[0].path))}</p><div class="tiles">{tiles}</div>'
    heads = "".join(
        f'<th><span class="key c{i % charts.COLOURS}"></span>{shown(run.name)}</th>' for i, run in enumerate(runs)
    )
    names = list(dict.fromkeys(name for of_run in facts for name in of_run))
    table = {"path": [str(run.path) for run in runs], **{n: [of_run.get(n, "") for of_run in facts] for n in names}}
    rows = [
        f"<tr><td>{shown(name)}</td>{''.join(f'<td>{shown(value)}</td>' for value in values)}</tr>"
        for name, values in table.items()
    ]
    return f'<div class="scroll"><table class="facts"><tr><th></th>{heads}</tr>{"".join(rows)}</table></div>'


def _damaged(runs: Sequence[RunFolder]) -> str:
    lines = [
        f'<p class="warn">{shown(run.name)}: {n:,} damaged line{"" if n == 1 else "s"} of {file} passed over</p>'
        for run in runs
        for file, n in run.damaged.items()
    ]
    return "".join(lines)


def _of_each(runs: Sequence[RunFolder], made: Callable[[RunFolder], str]) -> str:
    found = [(run, made(run)) for run in runs]
    title = len(runs) > 1
    return "".join((f"<h3>{shown(run.name)}</h3>" if title else "") + text for run, text in found if text)


def _samples(runs: Sequence[RunFolder]) -> str:
    parts = []
    for run in runs:
        kept = spread(run.samples, max(2, MOST_SAMPLES // len(runs)))
        if not kept:
            continue
        newest = kept[-1].step
        of_run = []
        for step in sorted({sample.step for sample in kept}, reverse=True):
            texts = "".join(_sample(sample) for sample in kept if sample.step == step)
            opened = " open" if step == newest else ""
            of_run.append(f"<details{opened}><summary>step {step:,}</summary>{texts}</details>")
        left = len(run.samples) - len(kept)
        note = f'<p class="soft">{left:,} samples in between are left out</p>' if left else ""
        head = f"<h3>{shown(run.name)}</h3>" if len(runs) > 1 else ""
        parts.append(head + "".join(of_run) + note)
    return "".join(parts)


def spread(samples: Sequence[Sample], most: int) -> list[Sample]:
    """At most so many, evenly over the run, the first and the last among them."""
    if len(samples) <= most:
        return list(samples)
    return [samples[round(i * (len(samples) - 1) / (most - 1))] for i in range(most)]


def _sample(sample: Sample) -> str:
    text = sample.text
    if len(text) > LONGEST_SAMPLE:
        text = f"{text[:LONGEST_SAMPLE]} ... {len(text) - LONGEST_SAMPLE:,} more characters"
    prompt = sample.prompt if len(sample.prompt) <= 300 else sample.prompt[:300] + " ..."
    asked = f'<header>prompt <span class="sure">{shown(prompt)}</span></header>' if prompt else ""
    return f"<article>{asked}{text_html(text)}</article>"


def _layout(run: RunFolder) -> str:
    found = layout.layouts(run)
    parts = []
    for since, grid in found:
        parts.append((f"<h3>{shown(since)}</h3>" if len(found) > 1 else "") + layout.drawn(grid))
    return "".join(parts)


def _data(run: RunFolder) -> str:
    rows, note = data_rows(run)
    if not rows:
        return f'<p class="soft">{shown(note)}</p>' if note else ""
    names = list(dict.fromkeys(name for row in rows for name in row))
    side = {n: "" if any(isinstance(row.get(n), str) for row in rows) else ' class="num"' for n in names}
    heads = "".join(f"<th{side[name]}>{shown(name)}</th>" for name in names)
    body = "".join(f"<tr>{''.join(f'<td{side[n]}>{_cell(row.get(n))}</td>' for n in names)}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{heads}</tr>{body}</table></div><p class="soft">{shown(note)}</p>'


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.3f}" if math.isfinite(value) else ""
    return f"{value:,}" if isinstance(value, int) else shown(str(value))


def _events(run: RunFolder) -> str:
    kept = run.events[: MOST_EVENTS // 2] + run.events[max(MOST_EVENTS // 2, len(run.events) - MOST_EVENTS // 2) :]
    rows = "".join(
        f'<tr><td>step {event.step:,}<br><span class="kind {event.kind.split()[0]}">{event.kind}</span></td>'
        f"<td>{shown(event.text)}</td></tr>"
        for event in kept
    )
    reasons: dict[str, int] = {}
    for _, why in run.metrics.skipped:
        reasons[why] = reasons.get(why, 0) + 1
    of_steps = ", ".join(f"{why} {n:,}" for why, n in reasons.items())
    notes = [f"steps without an update: {of_steps}"] if reasons else []
    notes += [f"{len(run.events) - len(kept):,} events in between are left out"] if len(kept) < len(run.events) else []
    note = f'<p class="soft">{shown("; ".join(notes))}</p>' if notes else ""
    return note + (f'<table class="events">{rows}</table>' if rows else "")


def _config(runs: Sequence[RunFolder]) -> str:
    keys = config_keys([run.config for run in runs])
    if not keys:
        return ""
    several = len(runs) > 1
    heads = "".join(
        f'<th><span class="key c{i % charts.COLOURS}"></span>{shown(run.name)}</th>' for i, run in enumerate(runs)
    )
    head, alone = (f"<tr><th></th>{heads}</tr>", "") if several else ("", " alone")
    body = "".join(_key_row(key, values) for key, values in keys.items())
    n = sum(len(set(values)) > 1 for values in keys.values())
    only = f'<label><input type="checkbox" id="only"> only the {n:,} keys that differ</label>' if several else ""
    find = '<input type="search" id="find" placeholder="find a key or value" aria-label="find a key or value">'
    search = f'<div class="find">{find}{only}</div>'
    return f'{search}<div class="scroll"><table class="config{alone}">{head}{body}</table></div>'


def _key_row(key: str, values: Sequence[str]) -> str:
    differs = ' class="differs"' if len(set(values)) > 1 else ""
    cells = "".join(f"<td>{shown(_short(value))}</td>" for value in values)
    return f'<tr data-key="{escape(key)}"{differs}><td>{shown(key)}</td>{cells}</tr>'


def _short(value: str) -> str:
    return value if len(value) <= 2000 else f"{value[:2000]} ..."


