"""Metrics and their standard errors, each against a number computed by hand."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from llm.evaluate.tasks import metrics
from llm.evaluate.tasks.base import Metric, computed
from llm.evaluate.tasks.perplexity import METRICS as OF_TEXTS
from llm.evaluate.tasks.statistics import bootstrap_stderr, mean_stderr
from llm.scorers import SCORERS


def test_the_best_choice_differs_by_what_its_log_probability_is_divided_by() -> None:
    choices, logprobs = ["ab", "äöü", "abcdefgh"], [-3.0, -3.5, -8.0]
    characters = metrics.normalised(logprobs, [len(text) for text in choices])  # -1.5, -1.167, -1.0
    of_bytes = metrics.normalised(logprobs, [len(text.encode()) for text in choices])  # -1.5, -0.583, -1.0
    assert [metrics.highest(scores)[0] for scores in (logprobs, characters, of_bytes)] == [0, 2, 1]


def test_a_choice_of_no_length_is_never_the_best_by_length() -> None:
    assert metrics.normalised([-0.1, -9.0], [0, 3]) == [-math.inf, -3.0]


def test_the_first_of_equal_scores_is_taken_and_named_a_tie() -> None:
    assert metrics.highest([-2.0, -1.0, -1.0]) == (1, True)
    assert metrics.highest([-2.0, -1.0, -1.5]) == (1, False)


def test_words_are_what_blanks_cut_a_text_into() -> None:
    assert metrics.words("one two\n\nthree") == 3
    assert metrics.words(" one ") == 3  # lm-eval counts what stands before the first blank and after the last


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("The cat sat.", "a cat sat down", 2 * 2 / (2 + 3)),
        ("dog", "cat", 0.0),
        ("cat cat", "cat", 2 * 1 / 3),
        ("the", "a", 1.0),  # neither has words
        ("", "cat", 0.0),
    ],
)
def test_f1_is_of_words_without_articles_and_punctuation(answer: str, reference: str, expected: float) -> None:
    assert metrics.f1(answer, reference) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(
    ("text", "value"),
    [("$1,234.50", 1234.5), ("18.", 18.0), (" -3 ", -3.0), ("45%", 45.0), (".5", 0.5), ("1e3", 1000.0), ("+7", 7.0),
     ("12,34", None), ("", None), ("-", None), ("18 apples", None), ("1.2.3", None), ("nan", None), (",", None)],
)  # fmt: skip
def test_numbers_are_read_with_currency_percent_and_commas_at_thousands(text: str, value: float | None) -> None:
    assert metrics.number(text) == value


def test_the_same_number_may_be_written_in_two_ways() -> None:
    assert metrics.same_number("1,000", "1000.0")
    assert not metrics.same_number("1000", "1001")
    assert not metrics.same_number("many", "many")


def test_pass_at_k_is_the_chance_that_one_of_k_drawn_is_correct() -> None:
    assert metrics.pass_at(5, 2, 1) == pytest.approx(2 / 5)
    assert metrics.pass_at(5, 2, 3) == pytest.approx(1 - 1 / 10)  # of C(5, 3) = 10 draws one has no correct answer
    assert metrics.pass_at(5, 3, 3) == 1.0
    assert metrics.pass_at(5, 0, 5) == 0.0


def test_the_most_frequent_answer_is_the_first_of_several_and_no_answer_is_none() -> None:
    assert metrics.most_frequent(["b", "a", "a", "b"]) == "b"
    assert metrics.most_frequent([None, None, "a"]) == "a"
    assert metrics.most_frequent([None, None]) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [("A red, round ball!", "red round ball"), ("Two", "2"), ("3.5", "3.5"), ("it's 1,000.", "its 1000"),
     ("none", "0"), ("yes.", "yes"), ("black-white", "black white")],
)  # fmt: skip
def test_answers_about_pictures_are_compared_without_articles_and_punctuation(text: str, expected: str) -> None:
    assert metrics.vqa_plain(text) == expected


@pytest.mark.parametrize(("count", "expected"), [(0, 0.0), (1, 1 / 3), (2, 2 / 3), (3, 1.0), (10, 1.0)])
def test_an_answer_that_three_people_gave_is_right(count: int, expected: float) -> None:
    assert metrics.vqa_accuracy("The Dog.", ["dog"] * count + ["cat"] * (10 - count)) == pytest.approx(expected)


def test_yes_and_no_are_read_at_the_beginning_of_an_answer() -> None:
    assert [metrics.yes_or_no(text) for text in ("Yes, it is.", "no", "perhaps yes", "")] == [True, False, None, None]


def test_texts_are_measured_by_sums_and_never_by_means_of_documents() -> None:
    measures = [
        {"logprob": -2 * math.log(2), "bytes": 8.0, "words": 2.0, "tokens": 4.0},
        {"logprob": -6 * math.log(2), "bytes": 2.0, "words": 2.0, "tokens": 4.0},
    ]
    found = {name: computed(name, metric, measures)[0] for name, metric in OF_TEXTS.items()}  # type: ignore[arg-type]
    assert found["bits_per_byte"] == pytest.approx(8 / 10)
    assert found["byte_ppl"] == pytest.approx(2 ** (8 / 10))
    assert found["word_ppl"] == pytest.approx(2 ** (8 / 4))
    assert found["ppl"] == pytest.approx(2 ** (8 / 8))


def test_the_standard_error_of_a_mean_is_the_sample_deviation_by_the_root_of_its_size() -> None:
    assert mean_stderr([1.0, 0.0, 0.0, 1.0]) == pytest.approx(math.sqrt((4 * 0.25) / 3) / 2)
    assert mean_stderr([1.0]) is None


def test_a_bootstrap_of_a_mean_is_its_standard_error() -> None:
    values = np.random.default_rng(3).normal(size=(400, 1))
    found = bootstrap_stderr(lambda sums: sums[..., 0] / 400, values)
    # of 1,000 samples the deviation is known to 1 / sqrt(2,000) = 2.2 %: four of these
    assert found == pytest.approx(mean_stderr(values[:, 0].tolist()), rel=0.09)
    assert found == bootstrap_stderr(lambda sums: sums[..., 0] / 400, values)


def test_a_metric_that_is_not_defined_is_none() -> None:
    nothing = Metric(("a", "b"), lambda sums: sums[..., 0] / sums[..., 1])
    assert computed("x", nothing, [{"a": 0.0, "b": 0.0}]) == (None, None)
    assert computed("x", Metric(), [{"x": None}]) == (None, None)
    assert computed("x", Metric(), [{"x": None}, {"x": 1.0}]) == (1.0, None)


LABELS, CLASSES = [0, 1, 1, 2, 2, 2], [0, 1, 0, 2, 2, 1]
BINARY, SCORES = [0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]


@pytest.mark.parametrize(
    ("name", "labels", "predicted", "expected"),
    [
        ("accuracy", LABELS, CLASSES, 4 / 6),
        ("macro_f1", LABELS, CLASSES, (2 / 3 + 1 / 2 + 4 / 5) / 3),
        ("roc_auc", BINARY, SCORES, 0.75),
        ("roc_auc", BINARY, [0.5, 0.5, 0.5, 0.5], 0.5),
        ("average_precision", BINARY, SCORES, 0.5 * 1 + 0.5 * 2 / 3),
        ("average_precision", BINARY, [1, 1, 1, 1], 0.5),
        ("rmse", [1.0, 2.0], [1.0, 4.0], math.sqrt(2)),
        ("mae", [1.0, 2.0], [1.0, 4.0], 1.0),
        ("r2", [1.0, 2.0, 3.0], [1.0, 2.0, 4.0], 0.5),
        ("r2", [1.0, 1.0], [1.0, 2.0], None),
        ("roc_auc", [1, 1], [0.1, 0.2], None),
        ("average_precision", [0, 0], [0.1, 0.2], None),
    ],
)
def test_predictions_are_scored(name: str, labels: list[float], predicted: list[float], expected: float | None) -> None:
    assert SCORERS[name](labels, predicted) == (None if expected is None else pytest.approx(expected, rel=1e-14))


@pytest.mark.parametrize("scorer", SCORERS.values())
def test_predictions_of_another_number_or_none_or_not_finite_are_refused(scorer: Callable[..., float]) -> None:
    for labels, predicted in (([0, 1], [0, 1, 1]), ([], []), ([0, 1], [0, math.nan])):
        with pytest.raises(ValueError):
            scorer(labels, predicted)
