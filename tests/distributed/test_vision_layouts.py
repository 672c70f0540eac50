"""Every layout trains a model with a vision tower as one process does: rows with none, one and three images, ranks and
micro-batches with none.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.pool import run_job
from tests.distributed.runs import LAYOUTS
from tests.distributed.test_zero import BF16, BF16_MEAN, FP32
from tests.distributed.vision_job import VISION
from tests.machine import has

pytestmark = pytest.mark.distributed

Case = dict[str, Any]
QUICK: dict[str, Case] = {
    "tensor": {"parallel": {"tensor": 2}, "train": {"micro_batch_size": 8}},
    "pipeline": {"parallel": {"pipeline": 2}},
    "ZeRO-3": {"parallel": {"zero_stage": 3}, "train": {"micro_batch_size": 2}},
    "expert": {"parallel": {"expert": 2}},
}
TEXT_FROZEN = ["tok_embeddings.*", "layers.*", "norm.*", "output.*"]
TOWER_FROZEN = ["vision_embeddings.*"]
LORA = {"rank": 4, "targets": ["wq", "w2", "experts", "vision.wq", "vision.wo", "vision.w1", "vision.w2", "vision.fc1",
                               "vision.fc2", "vision_projection"], "dropout": 0.1}  # fmt: skip
SETTINGS: dict[str, Case] = {
    "all trains": {},
    "tied, selective": {"model": {"tie_embeddings": True}, "train": {"activation_checkpointing": "selective"}},
    "full recomputation": {"train": {"activation_checkpointing": "full"}},
    "tower frozen": {"train": {"freeze": TOWER_FROZEN}},
    "tower and projection frozen": {"train": {"freeze": [*TOWER_FROZEN, "vision_projection.*"]}},
    "text frozen": {"train": {"freeze": TEXT_FROZEN}},
    "projection only": {"train": {"freeze": [*TEXT_FROZEN, *TOWER_FROZEN]}},
    "adapters": {"lora": LORA},
    "adapters of the tower": {"lora": {**LORA, "targets": ["vision.wq", "vision.fc1"]}},
    "adapters on int8": {"lora": {**LORA, "base": "int8"}},
    "muon": {"optim": {"name": "muon"}},
    "bf16": {"train": {"precision": "bf16"}},
    "bf16, selective": {"train": {"precision": "bf16", "activation_checkpointing": "selective"}},
    "compiled": {"train": {"compile": True}},
    "native": {"model": {"vision": {**VISION, "kind": "native", "image_size": 4}}},
}


def train(folder: Path, cases: list[Case], nproc: int, timeout: float = 240) -> list[list[dict[str, Any]]]:
    """The steps of each case."""
    file, out = folder / f"cases{nproc}.json", folder / f"out{nproc}.json"
    file.write_text(json.dumps(cases))
    done = run_job("tests/distributed/vision_job.py", str(file), str(out), nproc=nproc, timeout=timeout)
    assert done.returncode == 0, done.stderr
    found: list[list[dict[str, Any]]] = json.loads(out.read_text())
    return found


def assert_alike(rows: list[dict[str, Any]], expected: list[dict[str, Any]], half: bool, name: str) -> None:
    assert len(rows) == len(expected) > 0
    for step, (row, right) in enumerate(zip(rows, expected, strict=True)):
        assert row["skipped"] is None
        for key in ("loss", "scored", "grad_norm"):  # sums in another order, or of values rounded to bf16
            assert row[key] == pytest.approx(right[key], rel=BF16 if half else FP32), (name, step, key)
        assert half or row["checksum"] == right["checksum"], (name, step)
    if half:
        off = [row["loss"] / right["loss"] - 1 for row, right in zip(rows, expected, strict=True)]
        assert abs(sum(off) / len(off)) < BF16_MEAN, name


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return train(tmp_path_factory.mktemp("one"), [{}], 1)[0]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return dict(zip(QUICK, train(tmp_path_factory.mktemp("two"), list(QUICK.values()), 2), strict=True))


@pytest.mark.parametrize("name", QUICK)
def test_two_ranks_see_as_one_does(
    quick: dict[str, list[dict[str, Any]]], expected: list[dict[str, Any]], name: str
) -> None:
    assert_alike(quick[name], expected, half=False, name=name)


def merged(setting: Case, layout: Case) -> Case:
    """A setting on a layout of LAYOUTS, whose runs have 16 rows a step where these have 8."""
    micro = {"micro_batch_size": max(1, layout.get("micro", 4) // 2)}
    train = {**micro, **setting.get("train", {}), **layout.get("train", {})}
    return {**setting, **{key: layout[key] for key in ("parallel",) if key in layout}, "train": train}


@pytest.mark.full
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_layout_sees_alike(tmp_path: Path, setting: str) -> None:
    chosen = SETTINGS[setting]
    half = chosen.get("train", {}).get("precision") == "bf16"
    if half and not has("bf16"):
        pytest.skip("this device has no bf16 arithmetic")
    right: list[dict[str, Any]] = []
    for ranks, layouts in LAYOUTS.items():
        found = train(tmp_path, [merged(chosen, layout) for layout in layouts.values()], ranks, timeout=1500)
        right = right or found[0]
        for name, rows in zip(layouts, found, strict=True):
            assert_alike(rows, right, half, name)


@pytest.mark.full
def test_what_is_frozen_keeps_nothing_of_the_tower_for_a_backward(tmp_path: Path) -> None:
    settings = ("all trains", "tower frozen", "text frozen", "tower and projection frozen", "projection only")
    cases = [{**SETTINGS[name], "steps": 1, "kept": True} for name in settings]
    kept = {name: rows[-1]["kept"] for name, rows in zip(settings, train(tmp_path, cases, 1), strict=True)}
    assert {name: bool(found["graph"]) for name, found in kept.items()} == {
        name: name in ("all trains", "text frozen") for name in settings
    }
    assert kept["tower frozen"]["numbers"] < kept["all trains"]["numbers"]
    assert kept["tower and projection frozen"]["numbers"] < kept["tower frozen"]["numbers"]


@pytest.mark.full
def test_a_rank_without_images_never_makes_the_other_wait_for_ever(tmp_path: Path) -> None:
    layouts = [{"parallel": {"zero_stage": stage}, "train": {"micro_batch_size": 2}} for stage in (1, 2, 3)]
    frozen = {"parallel": {"zero_stage": 3}, "train": {"micro_batch_size": 2, "freeze": TOWER_FROZEN}}
    cases = [{**layout, "steps": 2} for layout in (*layouts, frozen)] * 20
    found = train(tmp_path, cases, 2, timeout=1500)
    assert len(found) == 80 and all(row["skipped"] is None for rows in found for row in rows)
