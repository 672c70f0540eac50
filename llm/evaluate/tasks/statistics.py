"""How sure a metric is: standard errors of means, and of what is computed from sums over documents, by bootstrap."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

ROUNDS = 1000
"""Samples of a bootstrap."""
SEED = 1234
BLOCK_BYTES = 1 << 26

OfRows = Callable[[NDArray[np.float64]], float | None]
"""A metric of the measures of all documents, (documents, columns), NaN where one has none; None = not defined."""
MOST_ELEMENTS = 100_000_000
"""Measures that a bootstrap of a metric of whole rows draws; with 1,000 rounds it would be more, it has 100."""
OfSums = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""A metric of sums over documents: (..., columns) to (...)."""


def mean_stderr(values: Sequence[float]) -> float | None:
    """The sample's standard deviation by the root of its size; None of fewer than two."""
    n = len(values)
    return float(np.std(np.asarray(values, dtype=np.float64), ddof=1) / np.sqrt(n)) if n > 1 else None


def bootstrap_stderr(of_sums: OfSums, columns: NDArray[np.float64], rounds: int = ROUNDS) -> float | None:
    """Standard deviation of a metric over samples of as many documents, drawn with replacement from one seed.
    columns: float64 (documents, c). None of fewer than two documents, or where it is not defined.
    """
    n, c = columns.shape
    if n < 2:
        return None
    draw = np.random.default_rng(SEED)
    block = max(1, BLOCK_BYTES // (8 * n))
    sums = np.empty((rounds, c))
    for start in range(0, rounds, block):
        picked = draw.integers(0, n, size=(min(block, rounds - start), n))
        for j in range(c):  # sums along an array, whose order no number of threads changes
            sums[start : start + len(picked), j] = columns[:, j][picked].sum(axis=1)
    with np.errstate(all="ignore"):
        values = of_sums(sums)
        found = float(np.std(values[~np.isnan(values)], ddof=1)) if np.sum(~np.isnan(values)) > 1 else np.nan
    return found if np.isfinite(found) else None


def bootstrap_of_rows(of_rows: OfRows, table: NDArray[np.float64]) -> float | None:
    """The same of a metric of all rows. None where it would take too long, with MOST_ELEMENTS measures in 100 rounds.
    """
    n = len(table)
    rounds = next((rounds for rounds in (ROUNDS, ROUNDS // 10) if rounds * table.size <= MOST_ELEMENTS), 0)
    if n < 2 or not rounds:
        return None
    draw = np.random.default_rng(SEED)
    values = [value for _ in range(rounds) if (value := of_rows(table[draw.integers(0, n, size=n)])) is not None]
    found = float(np.std(values, ddof=1)) if len(values) > 1 else np.nan
    return found if np.isfinite(found) else None
