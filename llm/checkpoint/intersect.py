"""What two flat ranges share when each counts the elements of its own box of a parameter.

A flat range of a row-major box is at most 2 N - 1 rectangles (boxes again) in N dimensions: part of a first row, whole
rows, part of a last one, and so on inside those two rows. What two ranges share is then a few rectangles too, and one
strided copy each, however short the parts of a row are that the two boxes have in common.
"""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import Tensor

from llm.boxes import Box, box_shape, whole


class Part(NamedTuple):
    """Elements [start, stop) of the flattened `box`."""

    box: Box
    start: int
    stop: int


def rectangles(part: Part) -> list[Box]:
    """The part as disjoint boxes of the parameter, none of them empty."""
    return [
        tuple((corner + a, corner + b) for (corner, _), (a, b) in zip(part.box, inner, strict=True))
        for inner in _rectangles(box_shape(part.box), part.start, part.stop)
    ]


def _rectangles(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    if start >= stop:
        return
    if not shape:
        yield ()
        return
    row = math.prod(shape[1:])
    first, head = divmod(start, row)
    last, tail = divmod(stop, row)
    if head:
        end = tail if first == last else row
        yield from (((first, first + 1), *inner) for inner in _rectangles(shape[1:], head, end))
        first += 1
    if first < last:
        yield ((first, last), *whole(shape[1:]))
    if first <= last:
        yield from (((last, last + 1), *inner) for inner in _rectangles(shape[1:], 0, tail))


def common(some: Iterable[Box], others: list[Box]) -> list[Box]:
    """What each of the boxes has in common with each of the others, where that is anything."""
    found = []
    for a in some:
        for b in others:
            both = tuple((max(i, k), min(j, m)) for (i, j), (k, m) in zip(a, b, strict=True))
            if all(i < j for i, j in both):
                found.append(both)
    return found


def view(values: Tensor, part: Part, rectangle: Box) -> Tensor:
    """The elements of a rectangle inside `part`, in the shape of the rectangle; `values` holds the part, flat."""
    shape = box_shape(part.box)
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    first = sum(
        (start - corner) * stride for (start, _), (corner, _), stride in zip(rectangle, part.box, strides, strict=True)
    )
    return values.as_strided(box_shape(rectangle), strides, values.storage_offset() + first - part.start)
