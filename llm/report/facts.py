"""What a run is in numbers and words: for the head of its report, its table of data and its table of keys."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from llm.report.folder import RunFolder

CYCLE = 4096
"""Rows over which a mixture keeps its proportions (llm/data/mixture.py)."""


def summary(run: RunFolder) -> dict[str, str]:
    """Name to value, in the order in which they are read; what is not known is left out."""
    metrics, last = run.metrics, run.metrics.last
    found: dict[str, str] = {}
    if last:
        found["step"] = f"{last['step']:,}" + (f" of {run.steps:,}" if run.steps else "")
    for name, key in (("loss", "loss"), ("held-out loss", "valid_loss")):
        values = metrics.column(key).values
        if len(values):
            found[name] = f"{values[-1]:.4f}"
    held_out = metrics.column("valid_loss")
    if len(held_out.values) > 1:
        best = int(np.argmin(held_out.values))
        found["best held out"] = f"{held_out.values[best]:.4f} at {held_out.steps[best]:,}"
    for name, key, form in (("tokens", "tokens", ",.0f"), ("epochs", "epoch", ".3f"), ("memory", "memory_gb", ".2f")):
        values = metrics.column(key).values
        if len(values):
            found[name] = format(values.max(), form) + (" GiB" if key == "memory_gb" else "")
    speed, seconds = metrics.column("tokens_per_s").values, metrics.column("step_time_s").values
    if len(speed):
        found["tokens/s, median"] = f"{np.median(speed):,.0f}"
    if len(seconds):
        found["time in steps"] = duration(float(seconds.sum()))
    newest = run.starts[-1] if run.starts else {}
    if isinstance(newest.get("parameters"), int):
        found["parameters"] = f"{newest['parameters']:,}"
    ranks = newest.get("ranks", run.ranks)
    if ranks is not None:
        found["ranks"] = f"{ranks} x {newest['device']}" if newest.get("device") else str(ranks)
    precision = (run.config.get("train") or {}).get("precision")
    if precision:
        found["precision"] = str(precision)
    return found


def duration(seconds: float) -> str:
    """As a person says it: 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    minutes, left = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {left:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02d} min"


def data_rows(run: RunFolder) -> tuple[list[dict[str, Any]], str]:
    """(a row for each source, a line about all of them). Of an older run only what its metrics say."""
    tokens, epochs = run.metrics.column("tokens").values, run.metrics.column("epoch").values
    note = f"{tokens[-1]:,.0f} tokens read" if len(tokens) else ""
    note += f", {epochs[-1]:.3f} passes over the data" if len(epochs) else ""
    newest = run.starts[-1] if run.starts else {}
    sources = [source for source in newest.get("sources") or () if isinstance(source, dict)]
    if not sources:
        return [], note
    read = _rows_read(run, newest)
    seq_len = newest.get("seq_len") or 0
    rows = []
    for source in sources:
        share, held = source.get("slots", 0) / CYCLE, source.get("rows") or 0
        row: dict[str, Any] = {"source": source.get("name"), "given": source.get("given"), "share": round(share, 4)}
        for key in ("documents", "samples", "pairs", "tokens"):
            if key in source:
                row[key] = source[key]
        row |= {"rows": held, "rows read": round(read * share), "positions read": round(read * share) * seq_len}
        row["epochs"] = read * share / held if held else None
        rows.append(row)
    return rows, f"{note}; rows of {seq_len:,} positions, {read:,} of them read" if note else ""


def _rows_read(run: RunFolder, start: dict[str, Any]) -> int:
    """Rows of the present data that the run has read: those before its newest start, and of the steps since."""
    rows = run.metrics.column("batch_size")
    since = rows.values[rows.steps > start.get("step", 0)]
    return int(start.get("consumed_rows") or 0) + int(since.sum())


def config_keys(configs: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Dotted key to its value in each config, in the order of the first; empty where a config does not have it."""
    flat = [_flat(config) for config in configs]
    names = list(dict.fromkeys(name for one in flat for name in one))
    return {name: [one.get(name, "") for one in flat] for name in names}


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(value, dict) and value:
        parts = (_flat(inner, f"{prefix}.{name}" if prefix else str(name)) for name, inner in value.items())
        return {key: text for part in parts for key, text in part.items()}
    if not prefix:
        return {}
    if value is None or isinstance(value, bool):
        return {prefix: "null" if value is None else str(value).lower()}
    return {prefix: value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)}
