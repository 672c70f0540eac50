"""Tables of numbers: Friedman's function as scikit-learn draws it, splits, and a series that obeys its equation."""

import csv
from pathlib import Path

import numpy as np
import pytest

from llm import LLM, ModelArgs
from llm.train.config.load import load_config
from tests.shared import ROOT
from tools.benchmarks import values as benchmark
from tools.values import friedman, mackey_glass, prepare, splits


def test_friedmans_function_is_that_of_scikit_learn() -> None:
    make = pytest.importorskip("sklearn.datasets").make_friedman1
    for found, right in zip(friedman(50), make(50, noise=1.0, random_state=0), strict=True):
        assert np.array_equal(found, right)


def test_every_row_is_held_out_in_one_split_and_trained_on_in_the_others() -> None:
    found = splits(23)
    assert sorted(np.concatenate([valid for _, valid in found]).tolist()) == list(range(23))
    assert all(sorted([*train, *valid]) == list(range(23)) for train, valid in found)


def test_the_series_obeys_the_delayed_equation() -> None:
    """The slope over two tenths of a unit, whose error is of the second order."""
    fine = mackey_glass(40, every=1)
    assert 0.2 < fine.min() < fine.max() < 1.5
    assert np.array_equal(mackey_glass(6, every=6), mackey_glass(36, every=1)[::6])
    middle = (fine[19:-1] - fine[17:-3]) / 2  # central differences over two units
    right = 0.2 * fine[1:20] / (1 + fine[1:20] ** 10) - 0.1 * fine[18:37]
    np.testing.assert_allclose(middle[: len(right)], right[: len(middle)], atol=0.01)  # slopes are up to 0.08


def test_prepared_tables_are_those_of_the_configs(tmp_path: Path) -> None:
    prepare("mackey_glass", str(tmp_path))
    with (tmp_path / "valid.csv").open() as file:
        assert len(list(csv.reader(file))) == 1 + 2000
    for name in ("friedman", "diabetes", "mackey_glass"):
        config = load_config(ROOT / f"configs/pretrain/{name}.yaml")
        assert config.tokenizer.kind == "none" and config.model.input_dim in (1, 10)


def test_a_linear_series_is_extrapolated_by_the_autoregression() -> None:
    steps = np.sin(0.3 * np.arange(400))
    weights = benchmark.autoregression(steps[:300])
    np.testing.assert_allclose(benchmark.extrapolated(weights, steps[268:300]), steps[300:350], atol=1e-6)


def test_each_held_out_step_is_predicted_by_what_came_before_it() -> None:
    args = ModelArgs(dim=16, n_layers=1, n_heads=2, input_dim=1, output_dim=1, ffn_hidden=16)
    model, steps = LLM(args).eval(), np.random.default_rng(0).normal(size=150)
    found = benchmark.one_step(model, steps, 64)
    assert len(found) == 86
    expected = model.predict_values(steps[32 : 64 + 5][:, None]).numpy()[-1, 0]
    assert found[5] == pytest.approx(expected, abs=1e-5)
