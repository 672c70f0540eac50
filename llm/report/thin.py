"""Curves for a screen: of the steps that fall on one of its pixels those with the least, the largest and the last
value, so that every spike stays and nothing is drawn that nobody can see.
"""

import base64

import numpy as np
from numpy.typing import NDArray

from llm.report.rows import Column

WINDOWS = 100
"""A mean over so many parts of a curve is drawn over it, where it has more points."""

RESTLESS = 5
"""How many times its own height a curve goes up and down before a mean is drawn over it."""


def thinned(column: Column, pixels: int, span: tuple[int, int]) -> Column:
    """At most three points for each of `pixels` equal parts of the steps from span[0] to span[1], and the first."""
    steps, values = column
    if len(steps) <= 3 * pixels:
        return column
    first, last = span
    pixel = (steps - first) * pixels // max(1, last - first + 1)
    by_value = np.lexsort((values, pixel))
    begins = np.flatnonzero(np.diff(pixel, prepend=pixel[0] - 1))
    ends = np.append(begins[1:], len(pixel)) - 1
    kept = np.unique(np.concatenate(([0], by_value[begins], by_value[ends], ends)))
    return Column(steps[kept], values[kept])


def smoothed(column: Column, window: int) -> Column:
    """Means over the last `window` points, of fewer at the beginning."""
    steps, values = column
    sums = np.concatenate(([0.0], np.cumsum(values)))
    end = np.arange(1, len(values) + 1)
    begin = np.maximum(end - window, 0)
    return Column(steps, (sums[end] - sums[begin]) / (end - begin))


def window_of(column: Column) -> int:
    """Points that a mean is taken over; 0 where the curve can be seen without, as it is short or smooth."""
    values = column.values
    if len(values) < 2 * WINDOWS:
        return 0
    way, height = np.abs(np.diff(values)).sum(), values.max() - values.min()
    return len(values) // WINDOWS if way > RESTLESS * height else 0


def packed(numbers: NDArray, kind: str) -> str:
    """Numbers as base64 of little-endian `u4` or `f4`, or of `u1`."""
    return base64.b64encode(np.ascontiguousarray(numbers, dtype=f"<{kind}").tobytes()).decode()
