"""`train.freeze`: what does not train is bitwise what it was, costs a checkpoint nothing, and every layout trains the
rest alike.
"""

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch

from llm import LLM
from llm.checkpoint.frozen import frozen_in
from llm.checkpoint.reader import resolve
from llm.errors import UserError
from llm.pretrained import taken_from
from tests.distributed.harness import metrics, without_timing, write_text
from tests.distributed.runs import LAYOUTS, Runs, perform
from tests.machine import has

pytestmark = pytest.mark.distributed

FROZEN = ("tok_embeddings.*", "layers.[01].*", "*.ffn_norm.*", "layers.3.*.experts.*", "layers.2.attention.w[qk].*")
"""The lower layers, and of the others norms (partial sums under TP), experts and single matrices."""
STEPS, HALF = 4, 2
RUNS = Runs(STEPS, HALF, {"train": {"freeze": FROZEN}})
item, half_of, assert_alike = RUNS.item, RUNS.half_of, RUNS.assert_alike


def parameters(path: Path) -> dict[str, torch.Tensor]:
    return dict(LLM.from_pretrained(path).named_parameters())


def is_frozen(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in FROZEN)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a run on one process that begins with its weights, one of two tensor-parallel ranks, and what continues
    the latter from its half."""
    folder = tmp_path_factory.mktemp("freeze")
    write_text(folder, documents=80)
    begin: dict[str, Any] = {"model": {"init_from": str(folder / "base")}}
    base = item(folder, "base", train={"steps": 1, "freeze": []})
    perform(folder, [base, item(folder, "one", **begin)], nproc=1)
    half: dict[str, Any] = {"checkpoint": half_of(folder, "two")}
    two: dict[str, Any] = {"parallel": {"tensor": 2}, "micro": 8, **begin}
    perform(folder, [item(folder, "two", **two), item(folder, "again", **two, **half)], nproc=2)
    return folder


def test_two_tensor_parallel_ranks_train_the_rest_as_one_does(runs: Path) -> None:
    assert_alike(runs, "two", "one", 1e-5)  # float32: sums in another order


def test_a_resume_goes_on_bitwise(runs: Path) -> None:
    assert without_timing(metrics(runs / "again")) == without_timing(metrics(runs / "two"))[HALF:]
    first, second = (parameters(runs / name) for name in ("two", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", ["one", "two"])
def test_frozen_tensors_are_bitwise_untouched_and_the_others_move(runs: Path, name: str) -> None:
    before, after = parameters(runs / "base"), parameters(runs / name)
    assert {key for key in before if torch.equal(before[key], after[key])} == {key for key in before if is_frozen(key)}


def test_a_checkpoint_holds_what_trains_and_says_where_the_rest_is(runs: Path) -> None:
    base, checkpoint = resolve(runs / "base"), resolve(runs / "two")
    assert set(checkpoint.shapes) == {name for name in base.shapes if not is_frozen(name)}
    said = frozen_in(checkpoint)
    assert said is not None and said.patterns == FROZEN
    assert dict(said.shapes) == {name: shape for name, shape in base.shapes.items() if is_frozen(name)}
    assert said.origin == taken_from(runs / "base") and said.origin.to_json()["digest"] == base.digest


def test_a_run_without_its_origin_names_the_folder_that_is_gone(runs: Path) -> None:
    origin = runs / "base" / "checkpoints"
    kept = origin.rename(origin.with_name("elsewhere"))
    try:
        with pytest.raises(UserError, match=rf"{origin}/step_00000001: is gone"):
            LLM.from_pretrained(runs / "two")
    finally:
        kept.rename(origin)


@pytest.mark.full
def test_a_moved_origin_is_given_by_init_from_and_frozen_parameters_may_be_trained_again(tmp_path: Path) -> None:
    write_text(tmp_path, documents=80)
    base = item(tmp_path, "base", train={"steps": 1, "freeze": []})
    whole: dict[str, Any] = {"model": {"init_from": str(tmp_path / "base")}}
    perform(tmp_path, [base, item(tmp_path, "one", **whole)], nproc=1)
    (tmp_path / "base").rename(tmp_path / "moved")
    half = half_of(tmp_path, "one")
    moved: dict[str, Any] = {"model": {"init_from": str(tmp_path / "moved")}}
    changes: dict[str, Any] = {**half, "allow_changes": ["train.freeze"]}
    thawed: dict[str, Any] = {"checkpoint": changes, "train": {"freeze": FROZEN[1:]}}
    runs = [item(tmp_path, "again", **moved, checkpoint=half), item(tmp_path, "thawed", **moved, **thawed)]
    perform(tmp_path, runs, nproc=1)
    assert without_timing(metrics(tmp_path / "again")) == without_timing(metrics(tmp_path / "one"))[HALF:]
    first, rest = metrics(tmp_path / "thawed"), metrics(tmp_path / "again")
    assert first[0]["loss"] == rest[0]["loss"] and first[0]["grad_norm"] > rest[0]["grad_norm"]
    assert "tok_embeddings.weight" in resolve(tmp_path / "thawed").shapes
    before, after = (parameters(tmp_path / name)["tok_embeddings.weight"] for name in ("moved", "thawed"))
    assert 0 < (before - after).abs().max() < 0.01  # two small steps of AdamW away from where they were


SETTINGS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "muon": {"optim": {"name": "muon"}},
    "tied": {"model": {"tie_embeddings": True}},
    "tied, the table trains": {"model": {"tie_embeddings": True}, "train": {"freeze": ["layers.*.ffn_norm.*"]}},
    "all experts": {"train": {"freeze": ["*.experts.*"]}},
    "upper layers": {"train": {"freeze": ["layers.[23].*", "norm.*", "output.*"]}},
    "bf16": {"train": {"precision": "bf16"}},
    "bf16 selective": {"train": {"precision": "bf16", "activation_checkpointing": "selective"}},
}


@pytest.mark.full
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_layout_freezes_alike(tmp_path: Path, setting: str) -> None:
    chosen = SETTINGS[setting]
    half_precision = chosen.get("train", {}).get("precision") == "bf16"
    if half_precision and not has("bf16"):
        pytest.skip("this device has no bf16 arithmetic")
    write_text(tmp_path, documents=80)
    for ranks, layouts in LAYOUTS.items():
        items = []
        for name, layout in layouts.items():
            train = {**chosen.get("train", {}), **layout.get("train", {})}
            items.append(item(tmp_path, name, **{**chosen, **layout, "train": train}))
        perform(tmp_path, items, ranks, timeout=1200)
        for name in layouts:  # bf16: a token or two of the router's choices may fall otherwise
            assert_alike(tmp_path, name, "one process", 5e-3 if half_precision else 1e-5)
            frozen = frozen_in(resolve(tmp_path / name))
            assert frozen is not None
            before = LLM(LLM.from_pretrained(tmp_path / name).args, seed=0)
            after = parameters(tmp_path / name)
            assert all(torch.equal(before.get_parameter(key), after[key]) for key in frozen.shapes)
