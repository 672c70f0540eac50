"""Ranges of global rows that a run passes over: (first row, end row), the end not included."""

from collections.abc import Iterable, Sequence

Range = tuple[int, int]


def merged(ranges: Iterable[Sequence[int]]) -> list[Range]:
    """The same rows in as few ranges as possible, in order."""
    found: list[Range] = []
    for first, end in sorted((first, end) for first, end in ranges if first < end):
        if found and first <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((first, end))
    return found


def within(ranges: Iterable[Range], first: int, end: int) -> list[Range]:
    """What of the ranges lies in [first, end), merged."""
    return merged((max(first, low), min(end, high)) for low, high in ranges)


def described(ranges: Iterable[Range]) -> str:
    """`rows 8 to 15, 40`."""
    return "rows " + ", ".join(f"{first}" if end - first == 1 else f"{first} to {end - 1}" for first, end in ranges)
