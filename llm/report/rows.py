"""Rows of a run folder's JSON lines: columns of metrics.jsonl, and small files read whole.

What is no row, as a kill tears the last one, is passed over and counted.
"""

import json
import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

MOST_STEPS = 2**32
"""Steps are kept as 32 bits."""


class Column(NamedTuple):
    """One field over the steps that have a finite number there, ascending: int64 steps and float64 values, (n,)."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]


@dataclass
class Metrics:
    """metrics.jsonl."""

    columns: dict[str, Column] = field(default_factory=dict)
    """In the order in which fields first came."""
    last: dict[str, Any] = field(default_factory=dict)
    """The row of the newest step."""
    skipped: list[tuple[int, str]] = field(default_factory=list)
    """Steps without an update, and why."""
    damaged: int = 0
    """Lines that were passed over."""

    def column(self, name: str) -> Column:
        """A field that may be in no row."""
        return self.columns.get(name, Column(np.zeros(0, np.int64), np.zeros(0)))


class JsonLines:
    """The objects of a file that have a step; `damaged` counts its other lines. Nothing where there is no such file, or
    something else than a file, as a pipe to which a run has written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.damaged = 0

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(step, row) in the order of the file. OSError where it is there and cannot be read."""
        if not self._path.is_file():  # a pipe would be waited for, and a device may never end
            return
        with self._path.open("rb") as lines:
            for line in lines:
                try:
                    row = json.loads(line)
                    step = row["step"]
                    if type(step) is not int or not 0 <= step < MOST_STEPS:
                        raise ValueError
                except (ValueError, KeyError, TypeError, RecursionError):
                    self.damaged += bool(line.strip())
                    continue
                yield step, row


def read_metrics(path: Path) -> Metrics:
    """All rows as columns; of a step that is there twice, which a full disk may leave, the later row counts."""
    lines, found = JsonLines(path), Metrics()
    steps: dict[str, array] = {}
    values: dict[str, array] = {}
    newest = -1
    for step, row in lines:
        for name, value in row.items():
            kind = type(value)
            if kind is float or kind is int:
                if name not in values:
                    steps[name], values[name] = array("q"), array("d")
                try:
                    values[name].append(value)
                except OverflowError:  # an integer beyond all floats
                    continue
                steps[name].append(step)
        if row.get("skipped") is not None:
            found.skipped.append((step, str(row["skipped"])))
        if step >= newest:
            newest, found.last = step, row
    found.damaged = lines.damaged
    found.columns = {
        name: _sorted(np.array(steps[name], np.int64), np.array(values[name])) for name in values if name != "step"
    }
    found.skipped = sorted(dict(found.skipped).items())
    return found


def _sorted(steps: NDArray[np.int64], values: NDArray[np.float64]) -> Column:
    there = np.isfinite(values)
    steps, values = steps[there], values[there]
    if len(steps) > 1 and not (np.diff(steps) > 0).all():
        _, at = np.unique(steps[::-1], return_index=True)  # the first from behind
        at = len(steps) - 1 - at
        steps, values = steps[at], values[at]
    return Column(steps, values)


def derived(column: Column, over: Column) -> Column:
    """One field as a share of another, at the steps that have both."""
    steps, a, b = np.intersect1d(column.steps, over.steps, assume_unique=True, return_indices=True)
    below = over.values[b]
    share = np.divide(column.values[a], below, out=np.full(len(steps), math.nan), where=below != 0)
    return _sorted(steps, share)
