"""`train.freeze`: what does not train is bitwise what it was, costs a checkpoint nothing, and every layout trains the
rest alike.
"""

import json
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
from tests.distributed.harness import metrics, tiny_config, without_timing, write_text
from tests.distributed.pool import run_job
from tests.machine import has

pytestmark = pytest.mark.distributed

FROZEN = ("tok_embeddings.*", "layers.[01].*", "*.ffn_norm.*", "layers.3.*.experts.*", "layers.2.attention.w[qk].*")
"""The lower layers, and of the others norms (partial sums under TP), experts and single matrices."""
STEPS, HALF = 4, 2


def item(folder: Path, name: str, *, micro: int = 4, **sections: Any) -> dict[str, Any]:
    """A run as moves_job.py reads it, with a checkpoint at its half."""
    train = {"steps": STEPS, "micro_batch_size": micro, "freeze": FROZEN, **sections.pop("train", {})}
    sections["model"] = {**tiny_config(folder)["model"], **sections.get("model", {})}
    sections.setdefault("checkpoint", {})
    sections["checkpoint"] = {"interval": HALF, **sections["checkpoint"]}
    sections["optim"] = {"warmup_steps": 1, "ema_decay": 0.9, **sections.get("optim", {})}
    return {"name": name, "config": tiny_config(folder, train=train, **sections)}


def perform(folder: Path, items: list[dict[str, Any]], nproc: int, timeout: float = 240) -> None:
    file = folder / f"plan{nproc}.json"
    file.write_text(json.dumps(items))
    done = run_job("tests/distributed/moves_job.py", str(file), str(folder), nproc=nproc, timeout=timeout)
    assert done.returncode == 0, done.stderr


def parameters(path: Path) -> dict[str, torch.Tensor]:
    return dict(LLM.from_pretrained(path).named_parameters())


def is_frozen(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in FROZEN)


def assert_alike(folder: Path, name: str, reference: str, rel: float) -> None:
    rows, expected = metrics(folder / name), metrics(folder / reference)
    assert len(rows) == len(expected) == STEPS
    for row, right in zip(rows, expected, strict=True):
        for key in ("loss", "grad_norm"):
            assert row[key] == pytest.approx(right[key], rel=rel), (name, row["step"], key)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a run on one process that begins with its weights, one of two tensor-parallel ranks, and what continues
    the latter from its half."""
    folder = tmp_path_factory.mktemp("freeze")
    write_text(folder, documents=80)
    begin = {"model": {"init_from": str(folder / "base")}}
    base = item(folder, "base", train={"steps": 1, "freeze": []})
    perform(folder, [base, item(folder, "one", **begin)], nproc=1)
    half = {"checkpoint": {"resume": str(folder / "two" / "checkpoints" / f"step_{HALF:08d}")}}
    two = {"parallel": {"tensor": 2}, "micro": 8, **begin}
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
    whole = {"model": {"init_from": str(tmp_path / "base")}}
    perform(tmp_path, [base, item(tmp_path, "one", **whole)], nproc=1)
    (tmp_path / "base").rename(tmp_path / "moved")
    half = {"resume": str(tmp_path / "one" / "checkpoints" / f"step_{HALF:08d}")}
    moved = {"model": {"init_from": str(tmp_path / "moved")}}
    thawed = {"checkpoint": {**half, "allow_changes": ["train.freeze"]}, "train": {"freeze": FROZEN[1:]}}
    runs = [item(tmp_path, "again", **moved, checkpoint=half), item(tmp_path, "thawed", **moved, **thawed)]
    perform(tmp_path, runs, nproc=1)
    assert without_timing(metrics(tmp_path / "again")) == without_timing(metrics(tmp_path / "one"))[HALF:]
    first, rest = metrics(tmp_path / "thawed"), metrics(tmp_path / "again")
    assert first[0]["loss"] == rest[0]["loss"] and first[0]["grad_norm"] > rest[0]["grad_norm"]
    assert "tok_embeddings.weight" in resolve(tmp_path / "thawed").shapes
    before, after = (parameters(tmp_path / name)["tok_embeddings.weight"] for name in ("moved", "thawed"))
    assert 0 < (before - after).abs().max() < 0.01  # two small steps of AdamW away from where they were


LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"one process": {}},
    2: {
        "ZeRO-1": {},
        "ZeRO-2": {"parallel": {"zero_stage": 2}},
        "ZeRO-2 offload": {"parallel": {"zero_stage": 2, "offload_optimizer": True}},
        "ZeRO-3": {"parallel": {"zero_stage": 3}},
        "ZeRO-3 recomputed": {"parallel": {"zero_stage": 3}, "train": {"activation_checkpointing": "full"}},
        "tensor": {"parallel": {"tensor": 2}, "micro": 8},
        "tensor whole": {"parallel": {"tensor": 2, "sequence_parallel": False}, "micro": 8},
        "pipeline": {"parallel": {"pipeline": 2}},
        "dualpipev": {"parallel": {"pipeline": 2, "pipeline_schedule": "dualpipev"}, "micro": 2},
        "expert": {"parallel": {"expert": 2}},
    },
    4: {
        "tensor x pipeline": {"parallel": {"tensor": 2, "pipeline": 2}, "micro": 8},
        "tensor x expert": {"parallel": {"tensor": 2, "expert": 2}},
        "tensor x ZeRO-3": {"parallel": {"tensor": 2, "zero_stage": 3}},
    },
}
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
