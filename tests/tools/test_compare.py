"""Two evaluations compared by document."""

import math
from pathlib import Path

import numpy as np
import pytest

from llm.errors import UserError
from llm.evaluate.outputs import Output
from llm.evaluate.paired import binomial, paired
from tests.evaluate.written import answer_samples, choice_samples, write_output
from tools.compare import compare, lines, main


def test_the_probability_of_an_uneven_split_is_the_binomial_one() -> None:
    assert binomial(0, 0) == 1.0 and binomial(5, 10) == 1.0
    assert binomial(1, 6) == pytest.approx(2 * 7 / 64)  # 0 or 1 of 6, on either side
    assert binomial(5, 6) == binomial(1, 6)


def test_right_and_wrong_are_compared_exactly_and_documents_on_which_both_agree_say_nothing() -> None:
    a, b = np.zeros(46), np.zeros(46)
    a[0], b[1:6] = 1, 1
    found = paired(a, b)
    assert (found.better, found.worse, found.p) == (5, 1, pytest.approx(14 / 64))
    assert found.difference == pytest.approx(4 / 46)
    assert found.stderr == pytest.approx(np.std(b - a, ddof=1) / math.sqrt(46))
    assert found.interval[0] < found.difference < found.interval[1]


def test_signs_are_flipped_where_differences_have_sizes() -> None:
    a = np.array([1.0, 2.0, 3.0, 4.0])
    # of the 16 assignments of signs to 1, 2, 3, 4 only two have a sum of 10; within 5 standard deviations of 10,000
    assert paired(np.zeros(4), a).p == pytest.approx(2 / 16, abs=5 * math.sqrt(2 / 16 * 14 / 16 / 1e4))
    assert paired(a, a).p == 1.0 and paired(a, a).difference == 0


def test_the_interval_of_many_documents_is_about_two_standard_errors() -> None:
    draw = np.random.default_rng(3)
    found = paired(np.zeros(500), draw.normal(0.1, 1.0, 500))
    low, high = found.interval
    # the quantiles of 10,000 means vary by about 3% of a standard error
    assert (high - low) / 2 == pytest.approx(1.96 * found.stderr, rel=0.06)


def test_documents_without_a_number_are_left_out_and_nothing_in_common_is_refused() -> None:
    nan = math.nan
    assert paired(np.array([1.0, nan, 0.0]), np.array([1.0, 1.0, nan])).n == 1
    with pytest.raises(ValueError, match="no document has a number"):
        paired(np.array([nan]), np.array([1.0]))
    with pytest.raises(ValueError, match="1 and 2 documents"):
        paired(np.zeros(1), np.zeros(2))


def test_two_evaluations_are_compared_and_drawn_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write_output(tmp_path / "a", {"arc": choice_samples(1, skill=0.2), "gsm8k": answer_samples(1)})
    b = write_output(tmp_path / "b", {"arc": choice_samples(2, skill=0.9), "gsm8k": answer_samples(2)})
    main(str(a), str(b), html=str(tmp_path / "both.html"))
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in printed[1:]] == [
        ["arc", "acc"], ["arc", "acc_norm"], ["gsm8k", "f1"], ["gsm8k", "exact"]
    ]  # fmt: skip
    found, notes = compare(Output.read(a), Output.read(b))
    assert found["arc"]["acc"].difference > 0 and found["arc"]["acc"].p < 0.05 and not notes
    assert list(lines(found)) == printed
    assert "differ most in acc" in (tmp_path / "both.html").read_text()


def test_other_tasks_documents_or_ways_are_refused(tmp_path: Path) -> None:
    samples = choice_samples(1)
    a = Output.read(write_output(tmp_path / "a", {"arc": samples}))
    for name, tasks, facts, message in (
        ("b", {"piqa": samples}, {}, "has no results of task arc"),
        ("c", {"arc": samples[:-1]}, {}, "n is 40 in .* and 39 in"),
        ("d", {"arc": [*samples[:-1], samples[0]]}, {}, "document 40 is another one"),
        ("e", {"arc": samples}, {"version": 2}, "version is 1 in .* and 2 in"),
    ):
        with pytest.raises(UserError, match=message):
            compare(a, Output.read(write_output(tmp_path / name, tasks, **facts)))


def test_a_metric_that_one_of_them_lacks_is_said(tmp_path: Path) -> None:
    samples = choice_samples(1)
    without = [{**sample, "metrics": {"acc": sample["metrics"]["acc"]}} for sample in samples]
    a, b = write_output(tmp_path / "a", {"arc": samples}), write_output(tmp_path / "b", {"arc": without})
    found, notes = compare(Output.read(a), Output.read(b))
    assert list(found["arc"]) == ["acc"]
    assert notes == ["arc: acc_norm is not compared: no document has a number in both"]


def test_perplexities_are_compared_by_their_logarithms(tmp_path: Path) -> None:
    a, b = (
        write_output(tmp_path / name, {"wiki": [{"doc": i, "metrics": {"word_ppl": math.exp(x)}} for i, x in of]})
        for name, of in (("a", enumerate([1.0, 40.0])), ("b", enumerate([1.5, 39.5])))
    )
    found = compare(Output.read(a), Output.read(b))[0]["wiki"]["ln word_ppl"]
    assert found.first == pytest.approx(20.5) and found.difference == pytest.approx(0, abs=1e-9)
