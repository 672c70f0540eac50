"""The reports of tools/inspection.py as lines to read."""

from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import Any

from llm.data.ranges import described

SHOWN = 20
"""Lines of one kind that are printed; JSON has them all."""

Report = dict[str, Any]


def run_lines(report: Report, details: bool) -> Iterator[str]:
    """A run: where it stands, its checkpoints newest first, and what a resume would do; with `details` all about the
    checkpoint that it would take.
    """
    entries, last, resume = report["checkpoints"], report["last_recorded"], report["resume"]
    yield f"run {report['run']}: {_count(len(entries), 'checkpoint')}{_recorded(last)}"
    best = (resume or {}).get("best") or {}
    for entry in entries:
        marks = []
        if best.get("step") is not None and best["step"] == entry["step"]:
            marks.append("the best, {} {}".format(*_best(best)))
        if resume and resume["path"] == entry["path"]:
            marks.append("a resume takes this one")
        name = PurePath(entry["path"]).name if entry["step"] is None else f"step {entry['step']}"
        yield f"{name}: {_state(entry)}{''.join(f'; {mark}' for mark in marks)}"
        if entry["files"]:
            size = f"{_amount(entry['bytes'])} in {_count(entry['files'], 'file')}"
            yield f"  {size}, {_position(entry)}; written by {entry['written_by']}"
        yield from _problems(entry)
    if best.get("step") is not None and best["step"] not in [entry["step"] for entry in entries]:
        name, value = _best(best)
        yield f"the best {name}, {value}, was at step {best['step']}, which is not kept"
    if entries and not resume:
        yield "no valid checkpoint: a resume would stop and say so"
    for name in report["set_aside"]:
        yield f"{name}: set aside by a resume, as it was damaged"
    for name in report["unfinished"]:
        yield f"{name}: left by a save or removal that was cut off; the next start removes it"
    if resume and details:
        yield ""
        yield from checkpoint_lines(resume)


def checkpoint_lines(report: Report) -> Iterator[str]:
    """One checkpoint."""
    yield f"{report['path']}: {_state(report)}"
    yield from _problems(report)
    if not report["files"]:
        return
    best = report["best"] or {}
    yield f"step {report['step']}, {_position(report)}; written by {report['written_by']}"
    kinds = ", ".join(f"{kind} {_amount(size)}" for kind, size in report["bytes_by_kind"].items())
    yield (
        f"{report['parameters']:,} parameters in {_count(report['tensors'], 'tensor')}; "
        f"{_count(report['fragments'], 'fragment')} in {_count(report['files'], 'file')}, {_amount(report['bytes'])}"
        + (f": {kinds}" if kinds else "")
    )
    if frozen := report["frozen"]:
        origin = frozen["from"]
        place = f"drawn from seed {origin['seed']}" if "seed" in origin else f"read from {origin['path']}"
        gone = "" if frozen["there"] else ", which is gone"
        what = f"{frozen['parameters']:,} parameters in {_count(frozen['tensors'], 'tensor')} that do not train"
        yield f"not in it: {what}, {place}{gone}"
    if best.get("step") is not None:
        name, value = _best(best)
        yield f"best {name} so far: {value} at step {best['step']}"
    if report["passed_over"]:
        yield f"steps whose rows were passed over: {', '.join(map(str, report['passed_over']))}"
    if report["rows_passed_over"]:
        yield f"passed over: {described(report['rows_passed_over'])}"
    versions = {"format": report["format_version"], **report["versions"]}
    yield f"versions: {', '.join(f'{name} {version}' for name, version in versions.items())}"
    if report["config"]:
        yield f"model: {report['model'] or 'not one that this version knows'}"
        yield "config, where it is not the default:"
        for key, (value, default) in report["changed"].items():
            yield f"  {key}: {value}" + ("" if default is None else f"  (default {default})")
    if report["data"]:
        yield from _data_lines(report["data"])
    for name, kinds in report.get("every_tensor", {}).items():
        kept = [
            f"{kind} {held['dtype']} in {_count(held['fragments'], 'fragment')}"
            for kind, held in kinds.items()
            if kind != "shape"
        ]
        yield f"{name} {tuple(kinds['shape'])}: {', '.join(kept)}"


def _data_lines(data: Report) -> Iterator[str]:
    epochs = "epochs not known" if data["epochs"] is None else f"{data['epochs']:.4g} epochs"
    yield f"data: {data['rows']:,} rows of {data['seq_len']} tokens, {epochs}, in the order of seed {data['seed']}"
    if data["note"]:
        yield f"  {data['note']}"
    for source in data["sources"]:
        line = f"  {source['name']}: {source['rows']:,} rows read"
        if source["of"]:
            line += f" of its {source['of']:,}, {source['rows'] / source['of']:.4g} epochs ({source['folder']})"
        yield line
        if source["problem"]:
            yield f"    more is not known: {source['problem']}"
        if "times" in source:
            yield f"    {_times(source['times'])}"
            yield from _stretch_lines(source["stretches"])


def _stretch_lines(stretches: Sequence[Report]) -> Iterator[str]:
    shard = None
    for stretch in stretches[:SHOWN]:
        if stretch["shard"] != shard:
            shard = stretch["shard"]
            yield f"    {shard}"
        lines = "" if stretch["lines"] is None else f" lines {stretch['lines'][0]} to {stretch['lines'][1]}"
        if stretch["rows"] is None and stretch["times"]:
            yield f"      {stretch['file']}{lines}: {_times(stretch['times'], 'sample')}"
        elif stretch["rows"] is None:
            yield f"      {stretch['file']}{lines}: behind the last whole row"
        else:
            first, last = stretch["rows"]
            yield f"      {stretch['file']}{lines}: rows {first} to {last}: {_times(stretch['times'])}"
    yield from _more(len(stretches))


def _times(times: dict[int, int], what: str = "row") -> str:
    """{2: 10, 1: 5} as `10 rows twice, 5 rows once`."""
    words = {0: "never", 1: "once", 2: "twice"}
    return ", ".join(f"{_count(rows, what)} {words.get(n, f'{n} times')}" for n, rows in times.items())


def _problems(entry: Report) -> Iterator[str]:
    for line in entry["faults"][:SHOWN]:
        yield f"  {line}"
    yield from _more(len(entry["faults"]))
    for block in entry["damaged_blocks"][:SHOWN]:
        yield f"  {block['reason']} at bytes {block['offset']} to {block['offset'] + block['bytes']}"
    yield from _more(len(entry["damaged_blocks"]))


def _state(entry: Report) -> str:
    if not entry["whole"]:
        return "damaged"
    return "whole, every block read" if entry["verified"] else "whole (by manifest and lengths; --verify reads it)"


def _position(entry: Report) -> str:
    unknown = "an unknown number of"
    tokens, rows = (unknown if n is None else f"{n:,}" for n in (entry["tokens"], entry["rows"]))
    return f"{tokens} tokens and {rows} rows seen"


def _best(best: Report) -> tuple[str, str]:
    """What a run follows, and the best of it."""
    metric = best.get("metric")
    return ("validation loss", f"{best['valid_loss']:.4f}") if metric is None else (metric, f"{best['score']:.4f}")


def _recorded(last: Report | None) -> str:
    if last is None:
        return ""
    return f", recorded to step {last['step']}" + (f", {last['tokens']:,} tokens" if last["tokens"] is not None else "")


def _more(total: int) -> Iterator[str]:
    if total > SHOWN:
        yield f"    ... and {total - SHOWN:,} more, with --json"


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}" + ("" if n == 1 else "s")


def _amount(size: int) -> str:
    """Bytes in decimal units."""
    units = ("bytes", "kB", "MB", "GB", "TB")
    power = min(max(len(str(size)) - 1, 0) // 3, len(units) - 1)
    return f"{size / 1000**power:.4g} {units[power]}"
