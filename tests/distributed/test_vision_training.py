"""Runs on rows with images, through the trainer: continued bitwise, alike on every layout, with frozen parts that stay
what they were and adapters of the tower that learn.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from llm import LLM
from llm.checkpoint.frozen import frozen_in
from llm.checkpoint.reader import resolve
from tests.distributed.harness import TINY_MODEL, metrics, without_timing, write_text
from tests.distributed.runs import LAYOUTS, Runs, perform

pytestmark = pytest.mark.distributed

STEPS, HALF = 4, 2
VISION = {"image_size": 8, "patch_size": 2, "dim": 16, "n_layers": 2, "n_heads": 2, "output_dim": 16}
TOWER = ["vision_embeddings.*"]
OF_LAYOUT = ("tile_imbalance", "tile_imbalance_in_order")


def write_images(folder: Path, rows: int = 60) -> None:
    """Pictures of one tile, and of three and the one that shows all, with captions; and texts without."""
    draw = np.random.default_rng(5)
    write_text(folder, documents=40)
    lines = []
    for i in range(rows):
        width = 24 if i % 3 == 0 else 8
        levels = draw.integers(0, 256, (8, width, 3), dtype=np.uint8)
        Image.fromarray(levels).save(folder / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "text": f"a {'red' if i % 2 else 'blue'} one"}))
    for name, part in (("images", lines[9:]), ("held_out", lines[:9])):
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in part))


def sections(folder: Path) -> dict[str, Any]:
    """Of every run here."""
    images = {"path": str(folder / "images.jsonl"), "kind": "image_text", "name": "images"}
    text = {"path": str(folder / "train.jsonl"), "name": "text"}
    return {
        "model": {**TINY_MODEL, "vision": VISION},
        "data": {
            "train": [{**images, "weight": 0.6}, {**text, "weight": 0.4}],
            "valid": [{**images, "path": str(folder / "held_out.jsonl")}],
        },
        "chat": {"add_tokens": True},
        "eval": {"interval": HALF, "rows": 8},
    }


def item(folder: Path, name: str, **more: Any) -> dict[str, Any]:
    return Runs(STEPS, HALF, sections(folder)).item(folder, name, **more)


def parameters(path: Path) -> dict[str, torch.Tensor]:
    return dict(LLM.from_pretrained(path).named_parameters())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process; one on two data-parallel ranks, and what goes on from its half."""
    folder = tmp_path_factory.mktemp("images")
    write_images(folder)
    perform(folder, [item(folder, "one")], nproc=1)
    half = Runs(STEPS, HALF).half_of(folder, "two")
    perform(folder, [item(folder, "two"), item(folder, "again", checkpoint=half)], nproc=2)
    return folder


@pytest.fixture(scope="module")
def begun(runs: Path) -> Path:
    """Runs that begin with the weights of the first one: with a frozen tower, and with adapters."""
    model = {"init_from": str(runs / "one")}
    lora = {"rank": 4, "targets": ["wq", "vision.wq", "vision.w1", "vision.fc2", "vision_projection"], "dropout": 0.1}
    frozen = {"train": {"freeze": TOWER}, "parallel": {"zero_stage": 3}}
    items = [
        item(runs, "frozen", model=model, **frozen),
        item(runs, "adapted", model=model, lora=lora, optim={"lr": 1e-2}),
    ]
    perform(runs, items, nproc=2)
    return runs


def test_two_ranks_train_on_images_as_one_does_and_read_as_many_tiles(runs: Path) -> None:
    Runs(STEPS, HALF).assert_alike(runs, "two", "one", 1e-5)  # float32: sums in another order
    one, two = metrics(runs / "one"), metrics(runs / "two")
    assert [row["tiles"] for row in one] == [row["tiles"] for row in two] and min(row["tiles"] for row in one) > 0
    for row in two:
        assert 1 <= row["tile_imbalance"] <= row["tile_imbalance_in_order"] <= 2
    assert all(row["tile_imbalance"] == 1 for row in one)


def test_a_run_on_images_goes_on_bitwise(runs: Path) -> None:
    assert without_timing(metrics(runs / "again")) == without_timing(metrics(runs / "two"))[HALF:]
    first, second = (parameters(runs / name) for name in ("two", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.full
def test_a_frozen_tower_is_bitwise_untouched_and_in_no_checkpoint(begun: Path) -> None:
    before, after = parameters(begun / "one"), parameters(begun / "frozen")
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still == {name for name in before if name.startswith("vision_embeddings.")}
    said = frozen_in(resolve(begun / "frozen"))
    assert said is not None and set(said.shapes) == still


@pytest.mark.full
def test_adapters_of_the_tower_and_its_projection_learn_beside_weights_that_stay(begun: Path) -> None:
    before, after = parameters(begun / "one"), parameters(begun / "adapted")  # base and adapter in one
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    layers = [f"vision_embeddings.layers.{i}" for i in range(VISION["n_layers"])]  # type: ignore[call-overload]
    assert {name for name in moved if name.startswith("vision")} == {
        *(f"{layer}.{name}.weight" for layer in layers for name in ("attention.wq", "feed_forward.w1")),
        "vision_embeddings.adapter.fc2.weight",
        "vision_projection.weight",
    }
    losses = [row["loss"] for row in metrics(begun / "adapted")]
    assert losses[-1] < losses[0]


@pytest.mark.full
@pytest.mark.parametrize("setting", ["all", "tower frozen", "adapters on int8"])
def test_every_layout_trains_on_images_alike(tmp_path: Path, setting: str) -> None:
    write_images(tmp_path)
    lora = {"rank": 4, "targets": ["wq", "experts", "vision.wq", "vision.fc1", "vision_projection"], "base": "int8"}
    chosen: dict[str, Any] = {
        "all": {}, "tower frozen": {"train": {"freeze": TOWER}}, "adapters on int8": {"lora": lora}
    }[setting]  # fmt: skip
    for ranks, layouts in LAYOUTS.items():
        items = []
        for name, layout in layouts.items():
            train = {**chosen.get("train", {}), **layout.get("train", {})}
            items.append(item(tmp_path, name, **{**chosen, **layout, "train": train}))
        perform(tmp_path, items, ranks, timeout=1500)
        for name in layouts:
            Runs(STEPS, HALF).assert_alike(tmp_path, name, "one process", 1e-5)
