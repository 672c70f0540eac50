"""Scores of labels of which some are missing, against numbers computed by hand."""

import numpy as np
import pytest

from llm.prediction_scores import SCORES, of_one_value
from llm.scorers import SCORERS

NAN = np.nan
LABELS = np.array([[1, 0, 1], [0, NAN, 1], [1, 1, NAN], [0, 1, NAN]])
ANSWERS = np.array([[0.9, 0.2, 0.6], [0.4, 0.9, 0.4], [0.3, 0.8, 0.9], [0.1, 0.7, 0.9]])


def test_labels_are_ranked_each_by_itself_where_there_are_both_and_the_rest_is_counted() -> None:
    """Of the first label one of four pairs is the wrong way round, the second is in order, the third has one value."""
    assert SCORES["multilabel"]["roc_auc"](LABELS, ANSWERS) == pytest.approx((3 / 4 + 1) / 2, rel=1e-15)
    assert SCORES["multilabel"]["average_precision"](LABELS, ANSWERS) == pytest.approx(((1 + 2 / 3) / 2 + 1) / 2)
    assert of_one_value(LABELS) == 1
    assert SCORES["multilabel"]["roc_auc"](LABELS[:, 2:], ANSWERS[:, 2:]) is None


def test_accuracy_is_of_all_labels_that_are_there_and_f1_the_mean_over_labels() -> None:
    assert SCORES["multilabel"]["accuracy"](LABELS, ANSWERS) == pytest.approx(7 / 9, rel=1e-15)
    of_each = [2 * 1 / (2 + 1), 1.0, 2 * 1 / (2 + 1)]
    assert SCORES["multilabel"]["macro_f1"](LABELS, ANSWERS) == pytest.approx(sum(of_each) / 3, rel=1e-15)


def test_the_score_of_two_classes_is_that_of_the_second_and_of_more_the_mean_of_each_against_the_rest() -> None:
    two = np.array([[0], [1], [NAN], [1.0]]), np.array([[0.8, 0.2], [0.3, 0.7], [0.5, 0.5], [0.9, 0.1]])
    assert SCORES["classification"]["roc_auc"](*two) == 0.5
    assert SCORES["classification"]["accuracy"](*two) == pytest.approx(2 / 3)
    labels = np.array([[0], [1], [1], [2.0]])
    three = labels, np.array([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.5, 0.3, 0.2], [0, 0.1, 0.9]])
    assert SCORES["classification"]["roc_auc"](*three) == pytest.approx((1 + 3.5 / 4 + 1) / 3)  # one tie
    assert SCORES["classification"]["macro_f1"](*three) == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)


def test_errors_of_values_are_sums_over_all_that_are_there_and_r2_the_mean_over_outputs() -> None:
    labels, answers = np.array([[1, NAN], [2, 10], [4, 20.0]]), np.array([[1, 3], [3, 12], [4, 20.0]])
    assert SCORES["regression"]["rmse"](labels, answers) == pytest.approx(((1 + 4) / 5) ** 0.5, rel=1e-15)
    assert SCORES["regression"]["mae"](labels, answers) == pytest.approx(3 / 5, rel=1e-15)
    of_each = [1 - 1 / (labels[:, 0].var() * 3), 1 - 4 / 50]
    assert SCORES["regression"]["r2"](labels, answers) == pytest.approx(sum(of_each) / 2, rel=1e-15)


@pytest.mark.parametrize("kind", SCORES)
def test_without_a_label_there_is_no_value(kind: str) -> None:
    labels, answers = np.full((2, 1 if kind == "classification" else 3), NAN), np.zeros((2, 3))
    assert {score(labels, answers) for score in SCORES[kind].values()} == {None}


def test_f1_of_a_label_that_is_neither_there_nor_predicted_is_0() -> None:
    assert SCORERS["f1"]([0, 0], [0, 0]) == 0.0 and SCORERS["f1"]([1, 0, 1], [1, 1, 0]) == 0.5
