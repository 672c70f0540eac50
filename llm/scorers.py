"""Scores of predictions as pure functions on arrays.

Shapes: n rows, C classes or labels. Each equals scikit-learn's of the same name.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def accuracy(labels: ArrayLike, predicted: ArrayLike) -> float:
    """Share of predicted classes, (n,), that are the labels."""
    truth, found = _alike(labels, predicted)
    return float(np.mean(truth == found))


def macro_f1(labels: ArrayLike, predicted: ArrayLike) -> float:
    """Mean over all classes that are labels or predicted, (n,), of the harmonic mean of precision and recall."""
    truth, found = _alike(labels, predicted)
    scores = []
    for name in np.union1d(truth, found):
        both = np.sum((truth == name) & (found == name))
        scores.append(2 * both / (np.sum(truth == name) + np.sum(found == name)))
    return float(np.mean(scores))


def f1(labels: ArrayLike, predicted: ArrayLike) -> float:
    """Harmonic mean of precision and recall of the label 1, of labels of 0 and 1, (n,); 0 where it is in neither."""
    truth, found = _alike(labels, predicted)
    _refuse_other_than_binary(truth)
    both, either = np.sum((truth == 1) & (found == 1)), np.sum(truth == 1) + np.sum(found == 1)
    return float(2 * both / either) if either else 0.0


def roc_auc(labels: ArrayLike, scores: ArrayLike) -> float | None:
    """How often a positive row scores higher than a negative one, ties counting half; labels of 0 and 1, (n,). None
    where there are not both."""
    truth, values = _alike(labels, scores)
    _refuse_other_than_binary(truth)
    positive = truth == 1
    n, m = int(positive.sum()), int((~positive).sum())
    if not n or not m:
        return None
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]  # of equal scores the mean of their ranks, from 1
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * m))


def average_precision(labels: ArrayLike, scores: ArrayLike) -> float | None:
    """Sum over thresholds of the gain in recall times the precision there; labels of 0 and 1, (n,). None without a
    positive row."""
    truth, values = _alike(labels, scores)
    _refuse_other_than_binary(truth)
    if not (truth == 1).any():
        return None
    order = np.argsort(-values, kind="stable")
    hits = np.cumsum(truth[order] == 1)
    last = np.append(np.diff(values[order]) != 0, True)  # of equal scores the last: they fall together
    precision, recall = (hits / np.arange(1, len(hits) + 1))[last], (hits / hits[-1])[last]
    return float(np.sum(np.diff(recall, prepend=0.0) * precision))


def rmse(labels: ArrayLike, predicted: ArrayLike) -> float:
    """Root of the mean square of what all predictions, (n,) or (n, C), are off."""
    truth, found = _alike(labels, predicted)
    return float(np.sqrt(np.mean((truth - found) ** 2)))


def mae(labels: ArrayLike, predicted: ArrayLike) -> float:
    """Mean of what all predictions, (n,) or (n, C), are off."""
    truth, found = _alike(labels, predicted)
    return float(np.mean(np.abs(truth - found)))


def r2(labels: ArrayLike, predicted: ArrayLike) -> float | None:
    """1 less the squares of what predictions, (n,), are off by those of the labels about their mean; None where all
    labels are the same."""
    truth, found = _alike(labels, predicted)
    spread = np.sum((truth - truth.mean()) ** 2)
    return float(1 - np.sum((truth - found) ** 2) / spread) if spread else None


SCORERS: dict[str, Callable[[ArrayLike, ArrayLike], float | None]] = {
    "accuracy": accuracy, "macro_f1": macro_f1, "roc_auc": roc_auc, "average_precision": average_precision,
    "rmse": rmse, "mae": mae, "r2": r2, "f1": f1,
}  # fmt: skip


def _alike(labels: ArrayLike, predicted: ArrayLike) -> tuple[Floats, Floats]:
    """Both as float64. ValueError where they are empty, of other shapes or not finite."""
    truth, found = np.asarray(labels, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    if truth.shape != found.shape or not truth.size:
        raise ValueError(f"labels {truth.shape} and predictions {found.shape} must have one shape, and rows")
    if not (np.isfinite(truth).all() and np.isfinite(found).all()):
        raise ValueError("labels and predictions must be finite")
    return truth, found


def _refuse_other_than_binary(truth: Floats) -> None:
    if truth.ndim != 1 or not np.isin(truth, (0, 1)).all():
        raise ValueError("labels must be 0 or 1, one a row")
