"""Whether two models differ on the same documents: differences by document, which vary far less than the scores."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
AT_ONCE = 4_000_000
"""Numbers drawn at a time."""


@dataclass(frozen=True)
class Paired:
    """Of a metric of the same documents, measured on two models."""

    n: int
    """documents that have the metric in both"""
    first: float
    second: float
    """means"""
    difference: float
    """second less first, in the mean"""
    stderr: float
    """of the difference; NaN of fewer than two documents"""
    interval: tuple[float, float]
    """95% of the difference by bootstrap over documents"""
    p: float
    """How often differences at least as large come up where the models do as well as each other: each document's
    difference then has either sign. Exact where all of them are of one size, as of right and wrong."""
    better: int
    worse: int
    """documents on which the second's number is higher, lower"""


def paired(first: NDArray[np.float64], second: NDArray[np.float64], seed: int = 0) -> Paired:
    """Compare; NaN where a document has no number. ValueError where the lengths differ, or none has one in both."""
    if first.shape != second.shape:
        raise ValueError(f"{len(first)} and {len(second)} documents cannot be compared one by one")
    there = np.isfinite(first) & np.isfinite(second)
    a, b = first[there], second[there]
    if not len(a):
        raise ValueError("no document has a number in both")
    d = b - a
    n, mean = len(d), float(d.mean())
    stderr = float(d.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    draw = np.random.default_rng(seed)
    means = np.concatenate([d[draw.integers(0, n, (k, n))].mean(1) for k in _chunks(n)])
    low, high = np.quantile(means, (0.025, 0.975))
    better, worse = int((d > 0).sum()), int((d < 0).sum())
    sizes = np.unique(np.abs(d[d != 0]))
    p = binomial(better, better + worse) if len(sizes) <= 1 else _sign_flips(d, draw)
    return Paired(n, float(a.mean()), float(b.mean()), mean, stderr, (float(low), float(high)), p, better, worse)


def binomial(k: int, n: int) -> float:
    """Two-sided probability of at least as uneven a split of n as k to n - k, where both sides are as likely."""
    if not n:
        return 1.0
    few = min(k, n - k)
    logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2) for i in range(few + 1)]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


def _sign_flips(d: NDArray[np.float64], draw: np.random.Generator) -> float:
    d = d[d != 0]
    least = abs(d.sum()) * (1 - 1e-12)  # sums in another order
    hits = sum(int((np.abs((draw.integers(0, 2, (k, len(d)), dtype=np.int8) * 2.0 - 1) @ d) >= least).sum())
               for k in _chunks(len(d)))  # fmt: skip
    return (hits + 1) / (RESAMPLES + 1)


def _chunks(n: int) -> Iterator[int]:
    """RESAMPLES in parts of which none draws more than AT_ONCE numbers."""
    most = max(1, AT_ONCE // n)
    for start in range(0, RESAMPLES, most):
        yield min(most, RESAMPLES - start)
