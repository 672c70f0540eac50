"""Runs on labelled rows: what they learn of the labels is kept by checkpoints, other runs and evaluations."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from llm import LLM
from tests.distributed.evaluations import content, words_of
from tests.distributed.harness import metrics, without_timing
from tests.distributed.pool import run_job
from tests.distributed.runs import Runs, perform

pytestmark = pytest.mark.distributed

RUNS = Runs(4, 2, {"optim": {"lr": 3e-3}, "eval": {"interval": 2}})
HEAD = {"n_prediction": 1, "prediction": "regression"}
CLASSES = {"n_prediction": 3, "prediction": "classification"}


def write_rows(path: Path, seed: int, rows: int) -> None:
    """Texts with a number, an order of magnitude away from 0, and a class; some of both are missing."""
    draw = np.random.default_rng(seed)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["smiles", "logp", "sort"])
        for i in range(rows):
            text = "".join(draw.choice(list("CNO"), size=draw.integers(2, 30)))
            number, sort = 100 + 5 * text.count("C"), f"most {max('CNO', key=text.count)}"
            writer.writerow([text, "" if i % 7 == 3 else number, "" if i % 5 == 3 else sort])


def item(folder: Path, name: str, label: str, model: dict[str, Any], **sections: Any) -> dict[str, Any]:
    """A run on these labels."""
    columns = {"text": "smiles", "label": label}
    source = {"path": str(folder / "train.csv"), "kind": "labelled", "columns": columns}
    data = {"train": [source], "valid": [{**source, "path": str(folder / "valid.csv")}]}
    made = RUNS.item(folder, name, model=model, data={**data, **sections.pop("data", {})}, **sections)
    made["config"]["task"] = "prediction"
    return made


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labelled")
    write_rows(folder / "train.csv", 0, 90)
    write_rows(folder / "valid.csv", 1, 20)
    write_rows(folder / "more.csv", 2, 90)
    begun = {"init_from": str(folder / "values")}
    half = RUNS.half_of(folder, "values")
    more = {"train": [{"path": str(folder / "more.csv"), "kind": "labelled"}]}
    more["train"][0] |= {"columns": {"text": "smiles", "label": "logp"}, "name": "train"}
    items = [
        item(folder, "values", "logp", HEAD),
        item(folder, "resumed", "logp", HEAD, checkpoint=half),
        item(folder, "other data", "logp", HEAD, data=more, checkpoint={**half, "allow_changes": ["data"]}),
        item(folder, "same head", "logp", HEAD | begun, data=more),
        item(folder, "other head", "logp", HEAD | begun | {"prediction_names": ["solubility"]}, data=more),
        item(folder, "classes", "sort", CLASSES),
    ]
    perform(folder, items, nproc=1)
    return folder


def model_in(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text())["model"]
    return found


def scales(run: Path) -> tuple[Any, ...]:
    return tuple(model_in(run)[f"prediction_{key}"] for key in ("names", "mean", "std"))


def test_names_and_scaling_are_those_of_the_training_rows_in_config_checkpoint_and_model(runs: Path) -> None:
    with (runs / "train.csv").open() as file:
        labels = np.array([float(row["logp"]) for row in csv.DictReader(file) if row["logp"]])
    names, mean, std = scales(runs / "values")
    assert names == ["logp"] and mean == pytest.approx([labels.mean()]) and std == pytest.approx([labels.std()])
    args = LLM.from_pretrained(runs / "values").args
    assert (args.prediction_mean, args.prediction_std) == (tuple(mean), tuple(std))
    assert model_in(runs / "classes")["prediction_names"] == ["most C", "most N", "most O"]


@pytest.mark.full
def test_they_are_the_same_on_two_ranks(runs: Path) -> None:
    perform(runs, [item(runs, "ZeRO-1", "logp", HEAD), item(runs, "two", "sort", CLASSES)], nproc=2)
    assert scales(runs / "ZeRO-1") == scales(runs / "values")
    assert model_in(runs / "two")["prediction_names"] == model_in(runs / "classes")["prediction_names"]
    RUNS.assert_alike(runs, "ZeRO-1", "values", rel=1e-5)  # float32 sums in another order
    RUNS.assert_alike(runs, "two", "classes", rel=1e-5)


def test_a_resumed_run_is_the_uninterrupted_one_and_keeps_its_scaling_on_other_data(runs: Path) -> None:
    whole, resumed = (without_timing(metrics(runs / name)) for name in ("values", "resumed"))
    assert resumed == whole[2:]  # bitwise: same layout, same threads
    assert scales(runs / "resumed") == scales(runs / "other data") == scales(runs / "values")


def test_a_run_begun_with_the_same_head_keeps_its_scaling_and_one_with_another_learns_it(runs: Path) -> None:
    assert scales(runs / "same head") == scales(runs / "values")
    names, mean, _ = scales(runs / "other head")
    assert names == ["solubility"] and mean != scales(runs / "values")[1]
    begins = {name: "begins anew" in (runs / name / "log.txt").read_text() for name in ("same head", "other head")}
    assert begins == {"same head": False, "other head": True}


@pytest.mark.full
def test_evaluations_give_the_same_bytes_on_two_ranks_and_cut_layers_the_same_up_to_rounding(runs: Path) -> None:
    for name, label in (("values", "logp"), ("classes", "sort")):
        task: dict[str, Any] = {"kind": "prediction", "data": {"path": "valid.csv"}, "prompt": "{{ smiles }}"}
        task["gold"] = f"{{{{ {label} }}}}"
        (runs / f"of_{name}.yaml").write_text(yaml.safe_dump(task))
    layouts: dict[str, list[str]] = {
        "one": [], "data": [], "batches": ["--batch_tokens=50"], "pipeline": ["--parallel.pipeline=2"],
        "tensor": ["--parallel.tensor=2"], "expert": ["--parallel.expert=2"],
    }  # fmt: skip
    for name in ("values", "classes"):
        plan = {
            layout: words_of(runs / name, [runs / f"of_{name}.yaml"], runs / f"{name}_{layout}", "--dtype=fp32", *words)
            for layout, words in layouts.items()
        }
        for nproc, some in ((1, ["one"]), (2, list(layouts)[1:])):
            file = runs / f"{name}{nproc}.json"
            file.write_text(json.dumps([plan[layout] for layout in some]))
            done = run_job("tests/distributed/evaluate_job.py", str(file), nproc=nproc)
            assert done.returncode == 0, done.stderr
        for layout in ("data", "batches", "pipeline"):
            assert content(runs / f"{name}_{layout}") == content(runs / f"{name}_one"), layout
        expected = predictions(runs / f"{name}_one", f"of_{name}")
        for layout in ("tensor", "expert"):  # halves of products are added in another order
            found = predictions(runs / f"{name}_{layout}", f"of_{name}")
            np.testing.assert_allclose(found, expected, rtol=1e-5)


def predictions(output: Path, task: str) -> list[list[float]]:
    lines = (output / "samples" / f"{task}.jsonl").read_text().splitlines()
    return [list(json.loads(line)["predictions"].values()) for line in lines]
