"""Scores of what a prediction head says of samples whose labels may be missing, as pure functions on arrays.

Answers are probabilities of classes, probabilities of labels that are there or not, or values in the units of labels.

Shapes: S samples, L labels of one: 1 of a classification, else C; C answers.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from llm.scorers import SCORERS

Floats = NDArray[np.float64]
Score = Callable[[Floats, Floats], float | None]
"""Of labels (S, L), NaN where one is missing, and answers (S, C); None where it has no value."""


def _together(name: str) -> Score:
    """All labels that are there, as if they were one label's."""

    def score(labels_SL: Floats, answers_SC: Floats) -> float | None:
        known = ~np.isnan(labels_SL)
        return SCORERS[name](labels_SL[known], answers_SC[known]) if known.any() else None

    return score


def _of_each(name: str, values: int = 2) -> Score:
    """The mean over the labels that have so many values or more."""

    def score(labels_SL: Floats, answers_SC: Floats) -> float | None:
        found = []
        for label_S, answer_S in zip(labels_SL.T, answers_SC.T, strict=True):
            known = ~np.isnan(label_S)
            if len(np.unique(label_S[known])) >= values:
                found.append(SCORERS[name](label_S[known], answer_S[known]))
        defined = [value for value in found if value is not None]
        return float(np.mean(defined)) if defined else None

    return score


def _of_likeliest(name: str) -> Score:
    """The likeliest class."""

    def score(labels_S1: Floats, answers_SC: Floats) -> float | None:
        return _together(name)(labels_S1, answers_SC.argmax(1).astype(np.float64)[:, None])

    return score


def _of_classes(name: str) -> Score:
    """The second of two classes, or the mean over more, each against the others."""

    def score(labels_S1: Floats, answers_SC: Floats) -> float | None:
        known, n = ~np.isnan(labels_S1[:, 0]), answers_SC.shape[1]
        classes = np.arange(1 if n == 2 else 0, n)
        return _of_each(name)((labels_S1[known] == classes).astype(np.float64), answers_SC[known][:, classes])

    return score


def _of_halves(score: Score) -> Score:
    """Whether the probability is above one half."""
    return lambda labels_SL, answers_SC: score(labels_SL, (answers_SC > 0.5).astype(np.float64))


SCORES: dict[str, dict[str, Score]] = {
    "classification": {
        **{name: _of_likeliest(name) for name in ("accuracy", "macro_f1")},
        **{name: _of_classes(name) for name in ("roc_auc", "average_precision")},
    },
    "regression": {"rmse": _together("rmse"), "mae": _together("mae"), "r2": _of_each("r2")},
    "multilabel": {
        **{name: _of_each(name) for name in ("roc_auc", "average_precision")},
        "accuracy": _of_halves(_together("accuracy")),
        "macro_f1": _of_halves(_of_each("f1", values=1)),
    },
}
"""By what is predicted (`model.prediction`), and by name."""


def of_one_value(labels_SL: Floats) -> int:
    """Labels of which all samples have the same value, or none has any: nothing can be ranked by them."""
    return sum(len(np.unique(label_S[~np.isnan(label_S)])) < 2 for label_S in labels_SL.T)
