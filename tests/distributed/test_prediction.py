"""A prediction head trains alike on every layout, and its metrics are the same numbers there."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from llm import LLM
from llm.checkpoint.reader import resolve
from tests.distributed import letters
from tests.distributed.harness import ROOT, metrics, write_text
from tests.distributed.runs import LAYOUTS, Runs, perform

pytestmark = pytest.mark.distributed

RUNS = Runs(4, 2, {"optim": {"lr": 3e-3}, "eval": {"interval": 2, "at_start": True}})
RELATIVE = 1e-5  # float32 sums in another order
KEYS = ("loss", "prediction_loss", "grad_norm")


def item(folder: Path, name: str, kind: str, *, model: dict[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
    """A run on samples of letters; `kind`: of the labels."""
    head = {**letters.model(kind), **(model or {})}
    made = RUNS.item(folder, name, model=head, **sections)
    made["config"] |= {"task": f"letters_{kind}", "extensions": [str(ROOT / "tests/distributed/letters.py")]}
    return made


def joint(folder: Path, name: str, **sections: Any) -> dict[str, Any]:
    """A run that learns texts from left to right, hidden parts of them, and which of three letters is frequent."""
    made = RUNS.item(folder, name, model=letters.model("classification"), **sections)
    for side in ("train", "valid"):
        rows = [json.loads(line)["text"][:40] for line in (folder / f"{side}.jsonl").read_text().splitlines()]
        labelled = [{"text": text, "label": max("abc", key=text.count)} for text in rows]
        (folder / f"{side}_labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))
        texts = {"path": str(folder / f"{side}.jsonl"), "kind": "text"}
        labels = {"path": str(folder / f"{side}_labels.jsonl"), "kind": "labelled", "name": "labels"}
        made["config"]["data"][side] = [texts | {"name": "text"}, texts | {"name": "hidden"}, labels]
    made["config"] |= {
        "task": [
            {"task": "lm", "source": "text"},
            {"task": "mlm", "source": "hidden", "weight": 0.5},
            {"task": "prediction", "source": "labels", "weight": 2.0},
        ],
        "mlm": {"mask_token": 1},
    }
    return made


def scores(folder: Path, name: str) -> list[dict[str, Any]]:
    """What each validation of a run says."""
    rows = [{k: v for k, v in row.items() if k.startswith("valid_")} for row in metrics(folder / name)]
    return [row for row in rows if row]


def assert_alike(folder: Path, name: str, reference: str) -> None:
    for row, right in zip(metrics(folder / name), metrics(folder / reference), strict=True):
        numbers = {key: x for key, x in right.items() if key in KEYS or key.startswith("valid_")}
        assert {key: row[key] for key in numbers} == pytest.approx(numbers, rel=RELATIVE), name


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prediction")
    write_text(folder, documents=60)
    begun = {"model": {"init_from": str(folder / "one process")}, "train": {"steps": 1}}
    items = [
        item(folder, "one process", "multilabel"),
        item(folder, "same outputs", "multilabel", **begun),
        item(folder, "other outputs", "regression", **begun),
        item(folder, "adapters", "regression", lora={"rank": 2, "base": "int8"}, **begun),
        joint(folder, "joint", eval={"best": "valid_prediction_roc_auc"}),
    ]
    perform(folder, items, nproc=1)
    quick = ("ZeRO-3", "tensor", "pipeline", "expert")
    perform(folder, [item(folder, name, "multilabel", **LAYOUTS[2][name]) for name in quick], nproc=2)
    return folder


@pytest.mark.parametrize("name", ["ZeRO-3", "tensor", "pipeline", "expert"])
def test_labels_are_learned_alike_on_two_ranks(runs: Path, name: str) -> None:
    assert_alike(runs, name, "one process")
    first, *_, last = scores(runs, name)
    assert last["valid_loss"] < first["valid_loss"] and last["valid_roc_auc"] > first["valid_roc_auc"]


def test_a_validation_says_the_scores_of_the_labels_and_of_its_step(runs: Path) -> None:
    names = ("loss", "roc_auc", "average_precision", "acc", "f1", "labels_without_both", "loss_ema")
    for row in scores(runs, "one process"):
        assert tuple(row) == tuple(f"valid_{name}" for name in names)
        assert 0 < row["valid_roc_auc"] < 1 and row["valid_labels_without_both"] == 0
    log = (runs / "one process" / "log.txt").read_text()
    assert "step 4: validation loss 0." in log and ", roc auc 0." in log and ", labels without both 0;" in log


def test_of_several_tasks_a_validation_says_what_each_says_alone_and_the_weighted_loss(runs: Path) -> None:
    for row in scores(runs, "joint"):
        assert {name.removeprefix("valid_") for name in row} == {
            "loss", "loss_ema", "lm_loss", "lm_ppl", "lm_bits_per_byte", "mlm_loss", "mlm_ppl", "mlm_acc",
            "prediction_loss", "prediction_acc", "prediction_f1", "prediction_roc_auc", "prediction_average_precision",
        }  # fmt: skip
        weighted = row["valid_lm_loss"] + 0.5 * row["valid_mlm_loss"] + 2.0 * row["valid_prediction_loss"]
        assert row["valid_loss"] == pytest.approx(weighted, rel=1e-12)
        assert 0 <= row["valid_mlm_acc"] < 1
    assert (runs / "joint" / "log.txt").read_text().count(", prediction roc auc ") == 3


def test_a_run_follows_a_field_of_one_of_its_tasks(runs: Path) -> None:
    best = resolve(runs / "joint").meta_with("best")["best"]
    said = [row["valid_prediction_roc_auc"] for row in scores(runs, "joint")]
    assert (best["metric"], best["higher_is_better"]) == ("valid_prediction_roc_auc", True)
    assert best["score"] == max(value for value in said if value is not None) and best["valid_loss"] is None


SUMMED = ("valid_loss", "valid_loss_ema")
"""Of float32 sums, which ranks add up in another order."""


@pytest.mark.parametrize("name", ["ZeRO-3", "pipeline"])
def test_scores_of_the_same_weights_have_the_same_bits_on_two_ranks(runs: Path, name: str) -> None:
    found, right = ({k: v for k, v in scores(runs, n)[0].items() if k not in SUMMED} for n in (name, "one process"))
    assert len(found) == 5 and found == right


@pytest.mark.full
def test_scores_of_the_same_weights_have_the_same_bits_on_one_two_and_three_ranks(tmp_path: Path) -> None:
    """13 held-out rows, which none of these divides."""
    write_text(tmp_path, documents=10)
    plain = {"train": {"steps": 1, "global_batch_size": 12}, "micro": 2}
    every = ["one"]
    perform(tmp_path, [item(tmp_path, "one", "regression", **plain)], nproc=1)
    for ranks in (2, 3):
        of_ranks = {"data": {}, "pipeline": {"pipeline": ranks}}
        items = [item(tmp_path, f"{n} {ranks}", "regression", parallel=p, **plain) for n, p in of_ranks.items()]
        perform(tmp_path, items, nproc=ranks)
        every += [f"{name} {ranks}" for name in of_ranks]
    found = [{k: v for k, v in scores(tmp_path, name)[0].items() if k not in SUMMED} for name in every]
    assert len(found[0]) == 3 and all(row == found[0] for row in found)


def weight_of(folder: Path, name: str, parameter: str) -> torch.Tensor:
    return LLM.from_pretrained(folder / name).get_parameter(parameter).detach()


def test_a_run_begins_with_a_head_of_the_same_outputs_and_anew_with_one_of_others(runs: Path) -> None:
    """One step of AdamW moves a value by its learning rate at most; the drawn one lies further off."""
    before, same, other = (
        weight_of(runs, name, "prediction.weight") for name in ("one process", "same outputs", "other outputs")
    )
    assert (before - same).abs().max() < 4e-3 < (before - other).abs().max()
    line = "note: the prediction head (regression, n_prediction=3) begins anew, as that model has a prediction head "
    said = {name: (runs / name / "log.txt").read_text() for name in ("same outputs", "other outputs", "adapters")}
    assert {name: line + "(multilabel, n_prediction=3)\n" in text for name, text in said.items()} == {
        "same outputs": False, "other outputs": True, "adapters": True
    }  # fmt: skip
    assert "note: prediction" not in "".join(said.values()), "it is said once"


def test_beside_adapters_the_head_trains_whole(runs: Path) -> None:
    checkpoint = resolve(runs / "adapters")
    held = {name for name in checkpoint.shapes if "lora" not in name}
    assert held == {"prediction.weight", "prediction.bias"}
    said = (runs / "adapters" / "log.txt").read_text()
    assert "parameters train, in adapters and the prediction head; the rest is" in said
    assert weight_of(runs, "adapters", "prediction.bias").any(), "it began at 0"
    kept = weight_of(runs, "one process", "norm.weight")
    assert torch.equal(weight_of(runs, "adapters", "norm.weight"), kept)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["classification", "regression", "multilabel"])
@pytest.mark.parametrize("tied", [False, True])
def test_labels_are_learned_alike_on_every_layout(tmp_path: Path, kind: str, tied: bool) -> None:
    """Untied, an output matrix that nothing reads is beside the head."""
    write_text(tmp_path, documents=10)
    pool = {"classification": "mean", "regression": "last", "multilabel": "first"}[kind]
    keys = {"tie_embeddings": tied, "pool": pool}
    for nproc, layouts in LAYOUTS.items():
        perform(tmp_path, [item(tmp_path, n, kind, model=keys, **own) for n, own in layouts.items()], nproc)
    for name in [name for layouts in LAYOUTS.values() for name in layouts]:
        assert_alike(tmp_path, name, "one process")


@pytest.mark.full
def test_several_tasks_are_learned_and_measured_alike_on_every_layout(tmp_path: Path) -> None:
    write_text(tmp_path, documents=80)
    for nproc, layouts in LAYOUTS.items():
        perform(tmp_path, [joint(tmp_path, name, **own) for name, own in layouts.items()], nproc)
    for name in [name for layouts in LAYOUTS.values() for name in layouts]:
        assert_alike(tmp_path, name, "one process")


@pytest.mark.full
def test_adapters_and_the_head_train_alike_on_two_ranks(tmp_path: Path) -> None:
    write_text(tmp_path, documents=10)
    perform(tmp_path, [item(tmp_path, "base", "regression"), *_adapted(tmp_path, {"one process": {}})], nproc=1)
    perform(tmp_path, _adapted(tmp_path, LAYOUTS[2]), nproc=2)
    for name in LAYOUTS[2]:
        assert_alike(tmp_path, name, "one process")


def _adapted(folder: Path, layouts: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    # adapters begin with gradients near 0, which AdamW makes steps of a full rate of, rounding included
    begun = {"model": {"init_from": str(folder / "base")}, "lora": {"rank": 2}, "optim": {"lr": 1e-3}}
    return [item(folder, name, "multilabel", **own, **begun) for name, own in layouts.items()]
