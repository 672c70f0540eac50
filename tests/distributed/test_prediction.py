"""A prediction head trains alike on every layout, and its metrics are the same numbers there."""

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

RUNS = Runs(4, 2, {"optim": {"lr": 3e-3}, "eval": {"interval": 2}})
RELATIVE = 1e-5  # float32 sums in another order
KEYS = ("loss", "prediction_loss", "grad_norm")


def item(folder: Path, name: str, kind: str, *, model: dict[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
    """A run on samples of letters; `kind`: of the labels."""
    head = {**letters.model(kind), **(model or {})}
    made = RUNS.item(folder, name, model=head, **sections)
    made["config"] |= {"task": f"letters_{kind}", "extensions": [str(ROOT / "tests/distributed/letters.py")]}
    return made


def assert_alike(folder: Path, name: str, reference: str) -> None:
    for row, right in zip(metrics(folder / name), metrics(folder / reference), strict=True):
        assert {key: row[key] for key in KEYS} == pytest.approx({key: right[key] for key in KEYS}, rel=RELATIVE), name
        valid = {key: value for key, value in right.items() if key.startswith("valid_")}
        assert {key: row[key] for key in valid} == pytest.approx(valid, rel=RELATIVE), name


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prediction")
    write_text(folder, documents=10)
    begun = {"model": {"init_from": str(folder / "one process")}, "train": {"steps": 1}}
    items = [
        item(folder, "one process", "multilabel"),
        item(folder, "same outputs", "multilabel", **begun),
        item(folder, "other outputs", "regression", **begun),
        item(folder, "adapters", "regression", lora={"rank": 2, "base": "int8"}, **begun),
    ]
    perform(folder, items, nproc=1)
    quick = ("ZeRO-3", "tensor", "pipeline", "expert")
    perform(folder, [item(folder, name, "multilabel", **LAYOUTS[2][name]) for name in quick], nproc=2)
    return folder


@pytest.mark.parametrize("name", ["ZeRO-3", "tensor", "pipeline", "expert"])
def test_labels_are_learned_alike_on_two_ranks(runs: Path, name: str) -> None:
    assert_alike(runs, name, "one process")
    assert metrics(runs / name)[-1]["valid_loss"] < metrics(runs / name)[1]["valid_loss"], "something is learned"


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
def test_adapters_and_the_head_train_alike_on_two_ranks(tmp_path: Path) -> None:
    write_text(tmp_path, documents=10)
    perform(tmp_path, [item(tmp_path, "base", "regression"), *_adapted(tmp_path, {"one process": {}})], nproc=1)
    perform(tmp_path, _adapted(tmp_path, LAYOUTS[2]), nproc=2)
    for name in LAYOUTS[2]:
        assert_alike(tmp_path, name, "one process")


def _adapted(folder: Path, layouts: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    begun = {"model": {"init_from": str(folder / "base")}, "lora": {"rank": 2}, "optim": {"lr": 1e-2}}
    return [item(folder, name, "multilabel", **own, **begun) for name, own in layouts.items()]
