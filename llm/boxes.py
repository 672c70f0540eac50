"""Parts of a parameter: which box of it tensor and expert parallelism leave on a rank, and how a box lies in the whole.

A box is a (start, stop) pair per dimension. Inside a box elements count row-major, as in a tensor of the box's shape;
ZeRO cuts that flat range further. Initial values, checkpoints and optimizers all use (box, flat range).
"""

import math
from collections.abc import Iterator

Box = tuple[tuple[int, int], ...]


def whole(shape: tuple[int, ...]) -> Box:
    """The box that is everything."""
    return tuple((0, n) for n in shape)


def box_shape(box: Box) -> tuple[int, ...]:
    """Shape of a tensor that holds the box."""
    return tuple(stop - start for start, stop in box)


def share_of(total: int, rank: int, ranks: int) -> tuple[int, int]:
    """Range of rank `rank` when `total` things are cut over `ranks`: sizes differ by one at most, larger ones first."""
    small, larger = divmod(total, ranks)
    start = rank * small + min(rank, larger)
    return start, start + small + (rank < larger)


def runs(shape: tuple[int, ...], box: Box, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Elements [start, stop) of the box as contiguous runs: (first element in the whole parameter, first element in the
    box, length), in order.
    """
    inner = box_shape(box)
    cut = max((i for i, (part, n) in enumerate(zip(inner, shape, strict=True)) if part != n), default=0)
    # from dimension `cut` on, the elements of a box are neighbours in the whole parameter too
    width = math.prod(inner[cut:])
    at = start
    while at < stop:
        outer, within = divmod(at, width)
        position = 0
        for i in range(cut - 1, -1, -1):
            outer, index = divmod(outer, inner[i])
            position += (box[i][0] + index) * math.prod(shape[i + 1 :])
        position += box[cut][0] * math.prod(shape[cut + 1 :]) if shape else 0
        length = min(width - within, stop - at)
        yield position + within, at, length
        at += length
