"""Checkpoint files on one process: what is written is read back, in any ranges, and nothing damaged is read at all."""

import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llm.boxes import whole
from llm.checkpoint import fragments
from llm.checkpoint.reader import Checkpoint, newest_valid, resolve
from llm.checkpoint.store import CheckpointStore
from llm.errors import DamagedFile, UserError
from llm.parallel.launch.world import World

WORLD = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
SHAPES = {"a.weight": (5, 7), "b.weight": (11,)}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fragments, "BLOCK_BYTES", 32)  # so that a few numbers already span several blocks


def values() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def save(folder: Path, step: int, **changes: int) -> Path:
    """A checkpoint as two ranks would have cut it: each parameter in two ranges, at an odd place."""
    store = CheckpointStore(
        folder, WORLD, keep=changes.get("keep", 9), keep_best=True, keep_every=changes.get("keep_every")
    )
    owned = []
    for name, tensor in values().items():
        flat = tensor.flatten() + step
        box = whole(SHAPES[name])
        owned += [(name, "master", box, 0, flat[:3]), (name, "master", box, 3, flat[3:])]
        owned += [(name, "exp_avg", box, 0, flat[:9] * 2), (name, "exp_avg", box, 9, flat[9:] * 2)]
    return store.save(step, SHAPES, owned, {"note": step}, changes.get("best"))


def test_any_range_reads_back_bit_for_bit(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save(tmp_path, 1))
    assert checkpoint.step == 1 and checkpoint.meta == {"note": 1}
    assert set().union(*checkpoint.kinds().values()) == {"exp_avg", "master"}
    for name, tensor in values().items():
        flat = tensor.flatten() + 1
        assert torch.equal(checkpoint.read(name), flat)
        for start in range(0, len(flat), 2):
            for stop in range(start, len(flat) + 1):
                assert torch.equal(checkpoint.read(name, "exp_avg", start=start, stop=stop), flat[start:stop] * 2)


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("file", ["manifest.json", "rank_00000.safetensors"])
def test_a_flipped_bit_is_never_read(tmp_path: Path, file: str, place: float) -> None:
    path = save(tmp_path, 1)
    content = bytearray((path / file).read_bytes())
    content[int(place * (len(content) - 1))] ^= 4
    (path / file).write_bytes(content)
    with pytest.raises(DamagedFile, match=file):
        checkpoint = Checkpoint.open(path)
        for name in SHAPES:
            checkpoint.read(name)
            checkpoint.read(name, "exp_avg")


@pytest.mark.parametrize("cut", [1, 100, None])
@pytest.mark.parametrize("file", ["manifest.json", "rank_00000.safetensors"])
def test_a_shortened_or_missing_file_is_refused_on_opening(tmp_path: Path, file: str, cut: int | None) -> None:
    path = save(tmp_path, 1)
    if cut is None:
        (path / file).unlink()
    else:
        (path / file).write_bytes((path / file).read_bytes()[:-cut])
    with pytest.raises(DamagedFile, match=file):
        Checkpoint.open(path)


def test_an_edited_manifest_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["meta"]["note"] = 2
    (path / "manifest.json").write_text(json.dumps(manifest, sort_keys=True))
    with pytest.raises(DamagedFile, match="does not match its digest"):
        Checkpoint.open(path)


def test_the_newest_valid_one_is_taken_and_the_skipped_are_told(tmp_path: Path) -> None:
    save(tmp_path / "checkpoints", 1)
    (save(tmp_path / "checkpoints", 2) / "manifest.json").write_text("{")
    checkpoint, skipped = newest_valid(tmp_path / "checkpoints")
    assert checkpoint is not None and checkpoint.step == 1
    assert len(skipped) == 1 and "step_00000002/manifest.json" in skipped[0]
    with pytest.raises(DamagedFile, match="step_00000002/manifest.json.*newest that is not is .*step_00000001"):
        resolve(tmp_path)
    with pytest.raises(UserError, match="holds no checkpoint"):
        resolve(_empty(tmp_path))


def _empty(tmp_path: Path) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


def test_retention_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in range(1, 7):
        save(tmp_path, step, keep=2, best=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000002", "step_00000005", "step_00000006"]


def test_retention_keeps_every_third_for_good(tmp_path: Path) -> None:
    for step in range(1, 9):
        save(tmp_path, step, keep=1, best=2, keep_every=3)
    assert [p.name[-1] for p in sorted(tmp_path.iterdir())] == ["2", "3", "6", "8"]


def test_a_file_is_what_safetensors_reads(tmp_path: Path) -> None:
    file = save(tmp_path, 1) / "rank_00000.safetensors"
    manifest = json.loads((file.parent / "manifest.json").read_text())
    tensors = load_file(file)
    assert len(tensors) == len(manifest["fragments"]) == 8
    for row in manifest["fragments"]:
        flat = (values()[row["name"]].flatten() + 1) * (2 if row["kind"] == "exp_avg" else 1)
        found = [t for key, t in tensors.items() if key.startswith(f"{row['name']}|{row['kind']}|")]
        expected = flat[row["start"] : row["start"] + row["numel"]]
        assert sum(torch.equal(t, expected) for t in found) == 1
        assert row["offset"] % 4 == 0


def test_a_save_of_the_same_step_replaces_the_damaged_one(tmp_path: Path) -> None:
    (save(tmp_path, 3) / "rank_00000.safetensors").write_bytes(b"")
    assert torch.equal(Checkpoint.open(save(tmp_path, 3)).read("b.weight"), values()["b.weight"] + 3)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000003"]


def test_a_disk_that_takes_no_more_is_named_and_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, WORLD, keep=1, keep_best=False)
    save(tmp_path, 1)
    large = torch.zeros(100_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # python ignores the signal, so writing fails
    try:
        with pytest.raises(UserError, match=r"rank_00000.safetensors"):
            store.save(2, {"c.weight": (100_000,)}, [("c.weight", "master", ((0, 100_000),), 0, large)], {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    checkpoint, skipped = newest_valid(tmp_path)
    assert checkpoint is not None and checkpoint.step == 1 and not skipped
