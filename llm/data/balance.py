"""Which rank reads which rows of a step: those with many tiles are dealt evenly, as the tower's work goes by tiles.

What a step contains does not depend on it, only where its rows lie. Steps without tiles keep their order.

Shapes: R rows of a step, M micro-batches of b rows on D data-parallel ranks, R = M D b.
"""

import heapq
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class Tiles(NamedTuple):
    """Tiles that each data-parallel rank reads in a step, (D,) each."""

    in_order: Ints
    """Were the rows dealt in the order of the data."""
    dealt: Ints
    """As they are dealt."""

    @property
    def total(self) -> int:
        """Of all ranks."""
        return int(self.dealt.sum())

    @staticmethod
    def imbalance(tiles_D: Ints) -> float:
        """Most tiles of a rank over their mean; 1 where all have as many."""
        return float(tiles_D.max() / tiles_D.mean()) if tiles_D.any() else 1.0


def dealt(tiles_R: Ints, ranks: int, micro_batch_size: int) -> tuple[Ints, Tiles]:
    """Places of the rows in each micro-batch of each rank, (M, D, b), and the tiles of the ranks.

    Rows go, the heaviest first, to the micro-batch with the fewest tiles that has room (Graham 1969's rule with places
    counted); then micro-batches alike in tiles are those that ranks compute at the same time, the heaviest on the rank
    that has had the fewest.
    """
    shape = -1, ranks, micro_batch_size
    in_order = np.arange(len(tiles_R)).reshape(shape)
    before = tiles_R[in_order].sum((0, 2))
    if not tiles_R.any():
        return in_order, Tiles(before, before)
    bins = _bins(tiles_R, len(tiles_R) // micro_batch_size, micro_batch_size)
    weights = tiles_R[bins].sum(1)
    heaviest = np.argsort(-weights, kind="stable").reshape(-1, ranks)
    places, after = np.empty_like(in_order), np.zeros(ranks, dtype=np.int64)
    for m, together in enumerate(heaviest):
        for bin_, rank in zip(together, np.argsort(after, kind="stable"), strict=True):
            places[m, rank] = bins[bin_]
            after[rank] += weights[bin_]
    return places, Tiles(before, after)


def _bins(tiles_R: Ints, count: int, size: int) -> Ints:
    """The rows in `count` groups of `size`, (count, size), ascending in each."""
    open_bins = [(0, number) for number in range(count)]
    held: list[list[int]] = [[] for _ in open_bins]
    for row in np.argsort(-tiles_R, kind="stable").tolist():
        tiles, number = heapq.heappop(open_bins)
        held[number].append(row)
        if len(held[number]) < size:
            heapq.heappush(open_bins, (tiles + int(tiles_R[row]), number))
    return np.sort(np.array(held, dtype=np.int64), axis=1)
