"""What a run recorded of its steps, and whether a step made again is the one recorded."""

import json
import math
from pathlib import Path
from typing import Any

from llm.errors import UserError


def check_replay(run_dir: Path, step: int, steps: int | None) -> None:
    """UserError unless `run_dir` recorded the step or stopped in it; `steps` is the length of the run if it is known.

    The step after the last recorded one counts: a step that ends a run by a loss that is not finite is not recorded.
    """
    recorded = read_metrics(run_dir)
    first, last = min(recorded), max(recorded)
    end = last + 1 if steps is None or last < steps else last
    if not first <= step <= end:
        more = f" (recorded: to {last})" if end > last else ""
        raise UserError(f"--replay_step={step}: {run_dir} can replay steps {first} to {end}{more}")


def read_metrics(run_dir: Path) -> dict[int, dict[str, Any]]:
    """Rows of metrics.jsonl by step, up to a torn last one; UserError naming the file when there are none."""
    file = run_dir / "metrics.jsonl"
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}; only a run with recorded steps can be replayed") from None
    rows: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if int(row["step"]):  # row 0 is a validation before the first step
                rows[int(row["step"])] = row
        except (ValueError, KeyError, TypeError, RecursionError):
            if number < len(lines):  # the last one is what a kill tore
                raise UserError(f"{file}: line {number}: damaged") from None
    if not rows:
        raise UserError(f"{file}: has no recorded step; only a run with recorded steps can be replayed")
    return rows


def recorded_to(run_dir: Path, step: int) -> list[dict[str, Any]]:
    return [row for number, row in sorted(read_metrics(run_dir).items()) if number <= step]


def compare(row: dict[str, Any], recorded: dict[str, Any]) -> dict[str, Any]:
    """For each key of `row`: whether the numbers are the same bits, and how far they are apart."""
    equal: dict[str, bool] = {}
    relative: dict[str, float] = {}
    for key, value in row.items():
        a, b = strict(value), recorded.get(key)
        equal[key] = a == b
        if not equal[key] and a is not None and b is not None:
            relative[key] = abs(a - b) / max(abs(a), abs(b))
    return {"equal": equal, "relative_difference": relative}


def strict(value: Any) -> Any:
    """The value with null for numbers that are not finite: JSON has none, and metrics.jsonl is written so too."""
    if isinstance(value, dict):
        return {key: strict(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [strict(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
