"""Pictures of a report as SVG text, which takes its colours from the page: readable on light and on dark."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

BINS = 24
WIDTH, HEIGHT = 420, 190
LEFT, RIGHT, TOP, BOTTOM = 52, 22, 14, 36
COLOURS = 8
"""Classes c0, c1, ... that the page gives colours; of more series they come again."""


@dataclass(frozen=True)
class Series:
    """Points of a line, with the standard error of each; None = not known."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float | None]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover [low, high] in about `count` steps."""
    span = high - low
    if not span > 0 or not math.isfinite(span):
        return [low]
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= count)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A number as short as it can be read."""
    return f"{value:,.0f}" if abs(value) >= 1000 and value == round(value) else f"{value:.4g}"


class _Axes:
    """A plot area with its scales, on which marks are put."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], label_x: str, label_y: str, title: str) -> None:
        self._x, self._y = x, y
        self.parts = [
            f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
            f"<title>{escape(title)}</title>"
        ]
        bottom = HEIGHT - BOTTOM
        for value in ticks(*y, count=4):
            at = self.at_y(value)
            self.parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
            self._text(LEFT - 6, at + 3.5, number(value), "end")
        for value in ticks(*x):
            at = self.at_x(value)
            self.parts.append(f'<path class="axis" d="M{at:.1f} {bottom}v4"/>')
            self._text(at, bottom + 15, number(value), "middle")
        self.parts.append(f'<path class="axis" d="M{LEFT} {bottom}H{WIDTH - RIGHT}"/>')
        self._text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5, label_x, "middle")
        self.parts.append(
            f'<text class="label" transform="translate(11 {(TOP + bottom) / 2:.0f}) rotate(-90)" '
            f'text-anchor="middle">{escape(label_y)}</text>'
        )

    def at_x(self, value: float) -> float:
        low, high = self._x
        return LEFT + (value - low) / ((high - low) or 1) * (WIDTH - LEFT - RIGHT)

    def at_y(self, value: float) -> float:
        low, high = self._y
        return HEIGHT - BOTTOM - (value - low) / ((high - low) or 1) * (HEIGHT - BOTTOM - TOP)

    def _text(self, x: float, y: float, text: str, anchor: str) -> None:
        self.parts.append(
            f'<text class="label" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
        )

    def done(self) -> str:
        return "".join([*self.parts, "</svg>"])


def histogram(groups: Sequence[tuple[str, NDArray[np.float64]]], label: str, what: str = "documents") -> str:
    """How often values come up, one group upon the other; each in the class `hN` of its place."""
    every = np.concatenate([values for _, values in groups])
    low, high = float(every.min()), float(every.max())
    whole = bool((every == np.round(every)).all())
    if whole and high - low < BINS:
        edges = np.arange(low - 0.5, high + 1)
    else:
        if low == high:
            low, high = low - 0.5, high + 0.5
        edges = np.linspace(low, high, BINS + 1)
    counts = [np.histogram(values, edges)[0] for _, values in groups]
    most = int(sum(counts).max())  # type: ignore[union-attr]
    names = ", ".join(f"{len(values):,} {name}".strip() for name, values in groups)
    axes = _Axes((float(edges[0]), float(edges[-1])), (0, most * 1.05), label, what, f"{label}: {names}")
    below = np.zeros(len(edges) - 1)
    for place, (group, (name, _)) in enumerate(zip(counts, groups, strict=True)):
        for i, count in enumerate(group):
            if count:
                left, right = axes.at_x(edges[i]), axes.at_x(edges[i + 1])
                top, bottom = axes.at_y(below[i] + count), axes.at_y(below[i])
                span = f"{number(float(edges[i]))} to {number(float(edges[i + 1]))}"
                width, height = max(right - left - 1, 0.5), max(bottom - top, 0.5)
                axes.parts.append(
                    f'<rect class="h{place}" x="{left + 0.5:.1f}" y="{top:.1f}" width="{width:.1f}" '
                    f'height="{height:.1f}"><title>{span}: {int(count):,} {escape(name or what)}</title></rect>'
                )
        below += group
    return axes.done()


def curves(series: Sequence[Series], label_x: str, label_y: str) -> str:
    """Lines with points, and one standard error up and down as a band."""
    xs = [value for line in series for value in line.x]
    low = min(y - (e or 0) for line in series for y, e in zip(line.y, line.error, strict=True))
    high = max(y + (e or 0) for line in series for y, e in zip(line.y, line.error, strict=True))
    room = (high - low) * 0.08 or abs(high) * 0.05 or 0.5
    axes = _Axes((min(xs), max(xs)), (low - room, high + room), label_x, label_y, f"{label_y} against {label_x}")
    for n, line in enumerate(series):
        colour = f"c{n % COLOURS}"
        errors = [e or 0.0 for e in line.error]
        upper = [(x, y + e) for x, y, e in zip(line.x, line.y, errors, strict=True)]
        lower = [(x, y - e) for x, y, e in zip(line.x, line.y, errors, strict=True)]
        band = " ".join(f"{axes.at_x(x):.1f},{axes.at_y(y):.1f}" for x, y in [*upper, *reversed(lower)])
        path = " ".join(f"{axes.at_x(x):.1f},{axes.at_y(y):.1f}" for x, y in zip(line.x, line.y, strict=True))
        axes.parts.append(f'<polygon class="band {colour}" points="{band}"/>')
        axes.parts.append(f'<polyline class="line {colour}" points="{path}"/>')
        for x, y, e in zip(line.x, line.y, line.error, strict=True):
            said = f"{line.name} {label_x} {number(x)}: {y:.4f}" + ("" if e is None else f" \u00b1 {e:.4f}")
            axes.parts.append(
                f'<circle class="dot {colour}" cx="{axes.at_x(x):.1f}" cy="{axes.at_y(y):.1f}" r="2.6">'
                f"<title>{escape(said.strip())}</title></circle>"
            )
    return axes.done()


def whiskers(values: Sequence[tuple[float | None, float | None]]) -> str:
    """Values with twice their standard error on one scale, a line each: which of them differ."""
    there = [(v, e or 0.0) for v, e in values if v is not None]
    if not there:
        return ""
    low, high = min(v - 2 * e for v, e in there), max(v + 2 * e for v, e in there)
    if all(0 <= v <= 1 for v, _ in there):
        low, high = 0.0, 1.0
    elif low == high or len(there) == 1:
        return ""  # there is nothing to compare it with
    width, step = 160, 12
    height = step * len(values)
    parts = [f'<svg class="whiskers" viewBox="0 0 {width} {height}" width="{width}" height="{height}">']
    for n, (value, error) in enumerate(values):
        y = step * (n + 0.5)
        parts.append(f'<path class="grid" d="M4 {y}H{width - 4}"/>')
        if value is None:
            continue
        ends = value - 2 * (error or 0.0), value, value + 2 * (error or 0.0)
        at = [4 + (x - low) / (high - low) * (width - 8) for x in ends]
        parts.append(
            f'<path class="line c{n % COLOURS}" d="M{max(at[0], 0):.1f} {y}H{min(at[2], width):.1f}"/>'
            f'<circle class="dot c{n % COLOURS}" cx="{at[1]:.1f}" cy="{y}" r="3.4"/>'
        )
    return "".join([*parts, "</svg>"])
