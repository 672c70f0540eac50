"""Regression and autoregression over values train alike on every layout; their scores are the same numbers there."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from llm import LLM
from tests.distributed.harness import metrics, without_timing
from tests.distributed.runs import LAYOUTS, Runs, perform

pytestmark = pytest.mark.distributed

RUNS = Runs(4, 2, {"optim": {"lr": 3e-3}, "eval": {"interval": 2, "at_start": True}})
RELATIVE = 1e-5  # float32 sums in another order
MODEL = {
    "dim": 32, "n_layers": 4, "n_heads": 4, "max_seq_len": 16, "ffn_hidden": 48, "dropout": 0.1, "ffn_dropout": 0.1
}  # fmt: skip
OF_TASK: dict[str, dict[str, Any]] = {
    "regression": {"input_dim": 2, "output_dim": 2, "pos": "learned", "causal": False, "head_dropout": 0.1},
    "autoregressive": {"input_dim": 2, "output_dim": 2, "pos": "sinusoidal"},
}
TASKS = tuple(OF_TASK)
LAYOUTS_ON_TWO = [name for name in LAYOUTS[2] if name != "expert"]
QUICK = {"regression": "ZeRO-3", "autoregressive": "tensor"}


def write_rows(folder: Path) -> None:
    """Samples of 1 to 6 positions of two numbers, far from 0, and two labels, of which some are missing; and series."""
    for seed, side in enumerate(("train", "valid")):
        draw = np.random.default_rng(seed)
        with (folder / f"{side}_regression.jsonl").open("w") as file:
            for i in range(80):
                values = draw.normal([100, -3], [20, 0.1], (draw.integers(1, 7), 2))
                label = [None if i % 7 == 3 else float(values[:, 0].mean()), float(values[:, 1].max())]
                file.write(json.dumps({"values": values.tolist(), "label": label}) + "\n")
        with (folder / f"{side}_autoregressive.jsonl").open("w") as file:
            for _ in range(20):
                t = np.arange(draw.integers(5, 40)) * 0.4 + draw.uniform(0, 6)
                file.write(json.dumps({"values": np.stack([50 + 9 * np.sin(t), np.cos(t)], 1).tolist()}) + "\n")


def item(folder: Path, task: str, name: str, **sections: Any) -> dict[str, Any]:
    made = RUNS.item(folder, f"{task} {name}", **sections)
    sources = {side: [{"path": str(folder / f"{side}_{task}.jsonl"), "kind": "values", "name": task}]
               for side in ("train", "valid")}  # fmt: skip
    made["config"]["model"] = MODEL | OF_TASK[task] | sections.get("model", {})
    made["config"]["data"] |= sources
    made["config"]["train"]["seq_len"] = 16
    made["config"]["task"] = task
    del made["config"]["tokenizer"]
    return made


def assert_alike(folder: Path, name: str, reference: str) -> None:
    rows, expected = metrics(folder / name), metrics(folder / reference)
    assert len(rows) == len(expected) == 1 + RUNS.steps  # with the validation at the start
    for row, right in zip(rows, expected, strict=True):
        keys = [key for key in right if key in ("loss", "grad_norm", "targets") or key.startswith("valid_")]
        assert {key: row[key] for key in keys} == pytest.approx({key: right[key] for key in keys}, rel=RELATIVE), name


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("values")
    write_rows(folder)
    items = [item(folder, task, "one process") for task in TASKS]
    half = RUNS.half_of(folder, "autoregressive one process")
    perform(folder, [*items, item(folder, "autoregressive", "resumed", checkpoint=half)], nproc=1)
    perform(folder, [item(folder, task, name, **LAYOUTS[2][name]) for task, name in QUICK.items()], nproc=2)
    return folder


@pytest.mark.parametrize("task", TASKS)
def test_values_are_learned_alike_on_two_ranks(runs: Path, task: str) -> None:
    assert_alike(runs, f"{task} {QUICK[task]}", f"{task} one process")
    said = [row for row in metrics(runs / f"{task} one process") if "valid_loss" in row]
    assert said[-1]["valid_loss"] < said[0]["valid_loss"] and said[-1]["valid_r2"] > said[0]["valid_r2"]


@pytest.mark.full
@pytest.mark.parametrize("task", TASKS)
def test_values_are_learned_alike_on_every_layout(runs: Path, task: str) -> None:
    names = [name for name in LAYOUTS_ON_TWO if name != QUICK[task]]
    perform(runs, [item(runs, task, name, **LAYOUTS[2][name]) for name in names], nproc=2, timeout=600)
    of_four = [name for name in LAYOUTS[4] if "expert" not in name]
    perform(runs, [item(runs, task, name, **LAYOUTS[4][name]) for name in of_four], nproc=4, timeout=600)
    for name in [*names, *of_four]:
        assert_alike(runs, f"{task} {name}", f"{task} one process")


def test_a_resumed_run_over_values_is_the_uninterrupted_one(runs: Path) -> None:
    whole, resumed = (without_timing(metrics(runs / f"autoregressive {n}")) for n in ("one process", "resumed"))
    assert len(resumed) == 2 and resumed == whole[-2:]  # bitwise: same layout, same threads


def test_scales_are_those_of_the_training_rows_in_the_config_and_the_model(runs: Path) -> None:
    rows = [json.loads(line) for line in (runs / "train_regression.jsonl").read_text().splitlines()]
    read = np.concatenate([np.array(row["values"]) for row in rows])
    labels = np.array([[np.nan if x is None else x for x in row["label"]] for row in rows])
    config = yaml.safe_load((runs / "regression one process" / "config.yaml").read_text())
    args = LLM.from_pretrained(runs / "regression one process").args
    assert config["tokenizer"]["kind"] == "none"
    for side, values in (("input", read), ("output", labels)):
        for key, right in (("mean", np.nanmean(values, 0)), ("std", np.nanstd(values, 0))):
            # values are read as float32
            assert config["model"][f"{side}_{key}"] == pytest.approx(right.tolist(), rel=1e-5)
            assert list(getattr(args, f"{side}_{key}")) == config["model"][f"{side}_{key}"]


def test_a_validation_says_scores_in_the_units_of_the_labels(runs: Path) -> None:
    """The model of the last checkpoint, row by row."""
    model = LLM.from_pretrained(runs / "autoregressive one process").eval()
    off, wanted = [], []
    for line in (runs / "valid_autoregressive.jsonl").read_text().splitlines():
        values = np.array(json.loads(line)["values"], dtype=np.float32)
        for first in range(0, len(values) - 1, 16):
            window = values[first : first + 17]
            found = model.predict_values(window[:-1])
            off.append(found.numpy() - window[1:])
            wanted.append(window[1:])
    last = [row for row in metrics(runs / "autoregressive one process") if "valid_loss" in row][-1]
    assert last["valid_rmse"] == pytest.approx(np.sqrt(np.square(np.concatenate(off)).mean()), rel=1e-4)
    assert last["valid_mae"] == pytest.approx(np.abs(np.concatenate(off)).mean(), rel=1e-4)
    scaled = np.concatenate(off) / np.array(model.args.output_std)
    assert last["valid_loss"] == pytest.approx(np.square(scaled).mean(), rel=1e-4)


@pytest.mark.full
def test_a_table_of_steps_is_a_series(runs: Path) -> None:
    """The same steps as rows of one file."""
    for side in ("train", "valid"):
        series = json.loads((runs / f"{side}_autoregressive.jsonl").read_text().splitlines()[0])["values"]
        (runs / f"{side}_list.jsonl").write_text(json.dumps({"values": series}) + "\n")
        with (runs / f"{side}_table.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["a", "b"], *series])
    items = []
    for form, ending, columns in (("list", "jsonl", {}), ("table", "csv", {"values": ["a", "b"]})):
        made = item(runs, "autoregressive", form)
        for side in ("train", "valid"):
            source = {"path": str(runs / f"{side}_{form}.{ending}"), "kind": "values", "columns": columns}
            made["config"]["data"][side] = [source | {"name": "series"}]
        items.append(made)
    perform(runs, items, nproc=1)
    found, right = (without_timing(metrics(runs / f"autoregressive {form}")) for form in ("table", "list"))
    assert found == right
