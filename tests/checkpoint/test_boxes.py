"""Checkpoints of ranks that own flat ranges inside boxes: any other layout reads them, and nothing is missing."""

import json
import math
import random
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llm.boxes import Box, box_shape, share_of, whole
from llm.checkpoint import assemble, fragments
from llm.checkpoint.fragments import Fragment, OwnedValues, digest
from llm.checkpoint.inspect import damaged_blocks, survey
from llm.checkpoint.intersect import Part, rectangles, view
from llm.checkpoint.reader import Checkpoint, seal
from llm.checkpoint.store import CheckpointStore
from llm.errors import DamagedFile, UserError
from llm.parallel.launch.world import World
from tests.checkpoint.ranks import as_ranks

BLOCK = 8  # values; so that small parameters already span several blocks


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fragments, "BLOCK_BYTES", 4 * BLOCK)
    monkeypatch.setattr(fragments, "LEAST_STRIPED_BYTES", 0)
    monkeypatch.setattr(fragments, "LEAST_STRIPED_BLOCK_BYTES", BLOCK)


@pytest.fixture
def save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Checkpoint]:
    """Saves what each of several ranks holds, a file each; the ranks are threads."""

    def save_as_ranks(shapes: dict[str, tuple[int, ...]], ranks: list[list[OwnedValues]]) -> Checkpoint:
        def save_as(world: World) -> Path:
            return CheckpointStore(tmp_path, world, keep=1, keep_best=False, cut=CUT).save(
                1, shapes, ranks[world.rank], {}
            )

        return Checkpoint.open(as_ranks(monkeypatch, len(ranks), save_as)[0])

    return save_as_ranks


def random_cuts(rng: random.Random, total: int, ranges: int) -> list[tuple[int, int]]:
    """Ranges that tile [0, total), some of them perhaps empty."""
    places = [0, *sorted(rng.randint(0, total) for _ in range(ranges - 1)), total]
    return list(zip(places, places[1:], strict=False))


def random_parts(rng: random.Random, shape: tuple[int, ...]) -> Iterator[Part]:
    """Every element of the shape once: a grid of boxes, each cut at places of its own."""
    for box in product(*(random_cuts(rng, n, rng.randint(1, 3)) for n in shape)):
        for start, stop in random_cuts(rng, math.prod(box_shape(box)), rng.randint(1, 4)):
            yield Part(box, start, stop)


def elements(whole_tensor: Tensor, part: Part) -> Tensor:
    return whole_tensor[tuple(slice(*ends) for ends in part.box)].reshape(-1)[part.start : part.stop]


COLUMNS = "layers.0.feed_forward.w2.weight"
CUT = {COLUMNS: 1, "layers.0.feed_forward.experts.w2": 1, "layers.0.feed_forward.experts.w1": 2}
"""The dimensions that tensor parallelism cuts: the last, the last but one, the last. They are written in stripes."""
DIMENSIONS = {"p0": 0, "p1": 1, "p2": 2, "p3": 2, "p4": 3, "p5": 4} | {
    COLUMNS: 2, "layers.0.feed_forward.experts.w2": 3, "layers.0.feed_forward.experts.w1": 3
}  # fmt: skip


def random_tensors(rng: random.Random) -> dict[str, Tensor]:
    shapes = {name: tuple(rng.randint(1, 9) for _ in range(dimensions)) for name, dimensions in DIMENSIONS.items()}
    # every value is a number of its own, so that no exchange of two goes unseen
    return {name: torch.arange(math.prod(s), dtype=torch.float32).reshape(s) + 1 for name, s in shapes.items()}


@pytest.mark.parametrize("seed", range(20))
def test_any_layout_reads_what_any_other_wrote(save: Callable[..., Checkpoint], seed: int) -> None:
    rng = random.Random(seed)
    tensors = random_tensors(rng)
    ranks: list[list[OwnedValues]] = [[] for _ in range(5)]
    for (name, tensor), kind in product(tensors.items(), ("master", "exp_avg")):
        for part in random_parts(rng, tuple(tensor.shape)):
            values = elements(tensor, part) * (1 if kind == "master" else -1)
            rng.choice(ranks).append((name, kind, part.box, part.start, values))
    checkpoint = save({name: tuple(tensor.shape) for name, tensor in tensors.items()}, ranks)
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.read(name).view(tensor.shape), tensor)
        for part in random_parts(rng, tuple(tensor.shape)):
            box, start, stop = part
            assert torch.equal(checkpoint.read(name, "master", box, start, stop), elements(tensor, part))
            assert torch.equal(checkpoint.read(name, "exp_avg", box, start, stop), -elements(tensor, part))


@pytest.mark.parametrize("seed", range(20))
def test_a_flat_range_is_few_rectangles_and_each_is_a_view_of_it(seed: int) -> None:
    rng = random.Random(seed)
    for tensor in random_tensors(rng).values():
        for part in random_parts(rng, tuple(tensor.shape)):
            found = rectangles(part)
            assert len(found) <= max(1, 2 * tensor.dim() - 1)
            cells = [tensor[tuple(slice(*ends) for ends in box)] for box in found]
            assert all(cell.numel() for cell in cells)
            values = elements(tensor, part)
            assert sorted(n for cell in cells for n in cell.flatten().tolist()) == values.tolist()
            held = torch.cat([torch.zeros(3), values])[3:]  # where it lies in its storage does not matter
            assert all(torch.equal(view(held, part, box), cell) for box, cell in zip(found, cells, strict=True))


@pytest.mark.parametrize("seed", range(10))
def test_only_blocks_that_hold_what_is_asked_for_are_read_and_each_once(
    save: Callable[..., Checkpoint], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    rng = random.Random(seed)
    places = torch.arange(12 * 17).reshape(12, 17)
    parts = list(random_parts(rng, (12, 17)))
    checkpoint = save({"w": (12, 17)}, [[("w", "master", p.box, p.start, elements(places, p)) for p in parts]])
    seen: list[tuple[Part, int]] = []
    original = assemble.read_block

    def watch(path: Path, descriptor: int, fragment: Fragment, i: int, *rest: Any) -> None:
        seen.append((fragment.part, i))
        original(path, descriptor, fragment, i, *rest)

    monkeypatch.setattr(assemble, "read_block", watch)
    for asked in random_parts(rng, (12, 17)):
        seen.clear()
        checkpoint.read("w", "master", *asked)
        wanted = set(elements(places, asked).tolist())
        expected = [
            (part, i)
            for part in parts
            for i, block in enumerate(elements(places, part).split(BLOCK))
            if wanted & set(block.tolist())
        ]
        assert sorted(seen) == sorted(expected)


def columns(tensor: Tensor, ranks: int) -> list[list[OwnedValues]]:
    """What is owned of a matrix cut by columns over ranks, in the order of elements as they lie in each box."""
    boxes = [((0, tensor.shape[0]), share_of(tensor.shape[1], rank, ranks)) for rank in range(ranks)]
    return [[("w", "master", box, 0, elements(tensor, Part(box, 0, math.prod(box_shape(box)))))] for box in boxes]


def test_a_damaged_block_stops_those_who_use_it_and_nobody_else(save: Callable[..., Checkpoint]) -> None:
    w = torch.randn(8, 10, generator=torch.Generator().manual_seed(0))
    checkpoint = save({"w": (8, 10)}, columns(w, 2))
    file = checkpoint.path / "rank_00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # in the fifth and last block of columns 5 to 10: from row 6, column 7 on
    file.write_bytes(content)
    checkpoint = Checkpoint.open(checkpoint.path)
    upper: Box = ((0, 6), (0, 10))
    assert torch.equal(checkpoint.read("w", "master", upper).view(6, 10), w[:6])
    assert torch.equal(checkpoint.read("w", "master", None, 0, 6 * 10 + 7), w.flatten()[: 6 * 10 + 7])
    for box, start in [(whole((8, 10)), 0), (((6, 7), (7, 8)), 0), (whole((8, 10)), 79)]:
        with pytest.raises(DamagedFile, match=r"rank_00001.safetensors: damaged: w \(master\)"):
            checkpoint.read("w", "master", box, start)


LEFT, RIGHT = ((0, 4), (0, 3)), ((0, 4), (3, 5))


def values(box: Box, start: int, n: int, kind: str = "master", name: str = "w") -> OwnedValues:
    return name, kind, box, start, torch.zeros(n)


GOOD = [values(LEFT, 0, 7), values(LEFT, 7, 5), values(RIGHT, 0, 8), values(whole((3,)), 0, 3, name="b")]
FAULTS = {
    "a range is missing at the end": ([GOOD[0], *GOOD[2:]], "up to 7 of 12"),
    "a range is missing at the start": ([GOOD[1], *GOOD[2:]], "misses 0 to 7"),
    "a range comes twice": ([*GOOD, GOOD[1]], "holds 7 to 12 twice"),
    "the whole of a box comes twice": ([*GOOD, GOOD[2]], "holds 0 to 8 twice"),
    "two ranges overlap": ([values(LEFT, 0, 8), *GOOD[1:]], "holds 7 to 8 twice"),
    "a range goes beyond its box": ([GOOD[0], values(LEFT, 7, 6), *GOOD[2:]], "up to 13 of 12"),
    "a box is missing": ([GOOD[2], GOOD[3]], "misses 0 to 3 of dimension 1"),
    "a cell of the grid is missing": (
        [values(((0, 2), (0, 3)), 0, 6), values(((2, 4), (0, 3)), 0, 6), values(((0, 2), (3, 5)), 0, 4), GOOD[3]],
        "has 3 of 4 boxes",
    ),
    "two boxes overlap": ([*GOOD[:2], values(((0, 4), (2, 5)), 0, 12), GOOD[3]], "holds 2 to 3 twice of dimension 1"),
    "a box lies on the whole": ([*GOOD, values(whole((4, 5)), 0, 20)], "twice of dimension 1"),
    "two boxes overlap and as much is missing": (
        [values(LEFT, 0, 12), values(((0, 2), (1, 5)), 0, 8), GOOD[3]],
        "w .master.",
    ),
    "a box goes beyond the parameter": ([*GOOD[:2], values(((0, 4), (3, 6)), 0, 12), GOOD[3]], "up to 6 of 5"),
    "a box has another number of dimensions": ([values(((0, 20),), 0, 20), GOOD[3]], "of a shape"),
    "a parameter is missing": (GOOD[:3], r"b \(master\)"),
    "a state is not whole": ([*GOOD, values(LEFT, 0, 12, "exp_avg")], r"w \(exp_avg\) is covered up to 3 of 5"),
    "values are of no parameter": ([*GOOD, values(RIGHT, 0, 8, name="v")], "v .master. belongs to no parameter"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_what_is_not_every_element_once_is_not_committed(
    save: Callable[..., Checkpoint], tmp_path: Path, case: str
) -> None:
    owned, message = FAULTS[case]
    with pytest.raises(UserError, match=message):
        save({"w": (4, 5), "b": (3,)}, [[p] for p in owned])
    assert not list(tmp_path.glob("step_*"))


def test_ranges_without_elements_and_empty_boxes_do_no_harm(save: Callable[..., Checkpoint]) -> None:
    nothing = [values(LEFT, 7, 0), values(((0, 4), (5, 5)), 0, 0), values(LEFT, 0, 0, "exp_avg")]
    checkpoint = save({"w": (4, 5), "b": (3,), "none": (0, 4)}, [GOOD, nothing])
    assert torch.equal(checkpoint.read("w"), torch.zeros(20))
    assert checkpoint.read("none").numel() == checkpoint.read("w", "master", ((2, 2), (0, 5))).numel() == 0


@pytest.mark.parametrize(
    "part", [(((0, 4),),), (((0, 5), (0, 5)),), (((-1, 2), (0, 5)),), (LEFT, 0, 13), (LEFT, -1), (LEFT, 3, 2)]
)
def test_a_part_that_the_parameter_does_not_have_is_refused(save: Callable[..., Checkpoint], part: tuple) -> None:
    checkpoint = save({"w": (4, 5), "b": (3,)}, [GOOD])
    with pytest.raises(UserError, match=r"w, of shape \(4, 5\), has no elements"):
        checkpoint.read("w", "master", *part)


def test_values_that_the_manifest_does_not_know_are_missed(save: Callable[..., Checkpoint]) -> None:
    w = torch.randn(8, 10, generator=torch.Generator().manual_seed(0))
    path = save({"w": (8, 10)}, columns(w, 2)).path / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["digest"]
    manifest["fragments"] = [row for row in manifest["fragments"] if row["box"][1][0] == 0]
    path.write_bytes(seal(manifest))
    checkpoint = Checkpoint.open(path.parent)
    assert torch.equal(checkpoint.read("w", "master", ((0, 8), (0, 5))), w[:, :5].flatten())
    with pytest.raises(DamagedFile, match=r"w \(master\) is not complete: 40 of 80 values"):
        checkpoint.read("w")


def test_a_checkpoint_of_whole_parameters_keeps_its_form(save: Callable[..., Checkpoint]) -> None:
    """What a manifest says of a fragment, field by field."""
    flat = torch.arange(6.0)
    ranks = [[("w", "master", whole((2, 3)), 0, flat[:4])], [("w", "master", whole((2, 3)), 4, flat[4:])]]
    checkpoint = save({"w": (2, 3)}, ranks)
    manifest = json.loads((checkpoint.path / "manifest.json").read_text())
    expected = []
    for rank, (start, stop) in enumerate([(0, 4), (4, 6)]):
        file = f"rank_{rank:05d}.safetensors"
        content = (checkpoint.path / file).read_bytes()
        expected.append(
            {
                "name": "w",
                "kind": "master",
                "box": [[0, 2], [0, 3]],
                "start": start,
                "numel": stop - start,
                "dtype": "float32",
                "file": file,
                "offset": len(content) - 4 * (stop - start),
                "block_bytes": 4 * BLOCK,
                "stripe": None,
                "blocks": [digest(flat[start:stop].numpy().tobytes())],
            }
        )
    assert manifest["version"] == 3
    assert sorted(manifest["fragments"], key=lambda row: row["start"]) == expected


def test_stripes_are_what_tensor_parallel_ranks_hold(save: Callable[..., Checkpoint], tmp_path: Path) -> None:
    """The columns of each of 2, 3, 4 or 6 ranks lie together in the file of one that has them all."""
    w = torch.arange(5 * 12, dtype=torch.float32).view(5, 12)
    checkpoint = save({COLUMNS: (5, 12)}, [[(COLUMNS, "master", whole((5, 12)), 0, w.flatten())]])
    (row,) = json.loads((checkpoint.path / "manifest.json").read_text())["fragments"]
    assert row["stripe"] == [1, 1]
    content = (checkpoint.path / row["file"]).read_bytes()[row["offset"] :]
    for ranks, rank in [(n, i) for n in (1, 2, 3, 4, 6) for i in range(n)]:
        first, last = share_of(12, rank, ranks)
        mine = torch.frombuffer(bytearray(content[20 * first : 20 * last]), dtype=torch.float32)
        assert mine.tolist() == w[:, first:last].t().flatten().tolist()
        assert torch.equal(checkpoint.read(COLUMNS, "master", ((0, 5), (first, last))), w[:, first:last].flatten())


def of_version_2(path: Path) -> None:
    """Turn a checkpoint without stripes into one as it was written before."""
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["digest"]
    manifest["version"] = 2
    for name, record in manifest["files"].items():
        record["header"] = digest((path / name).read_bytes()[: record["header_bytes"]], 2)
    for row in manifest["fragments"]:
        content = (path / row["file"]).read_bytes()[row["offset"] : row["offset"] + 4 * row["numel"]]
        assert row.pop("stripe") is None and row.pop("block_bytes")
        row["blocks"] = [digest(content, 2)] if content else []
    (path / "manifest.json").write_bytes(seal(manifest))


def test_what_version_2_of_the_format_wrote_is_read_and_verified(save: Callable[..., Checkpoint]) -> None:
    w = torch.randn(8, 10, generator=torch.Generator().manual_seed(0))
    path = save({"w": (8, 10)}, columns(w, 2)).path
    of_version_2(path)
    assert torch.equal(Checkpoint.open(path).read("w"), w.flatten())
    found = survey(path)
    assert found.version == 2 and not found.faults and not damaged_blocks(found)
    file = path / "rank_00001.safetensors"
    content = file.read_bytes()
    for place in (9, len(content) - 1):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert len(damaged_blocks(found)) == 1
        with pytest.raises(DamagedFile, match=r"rank_00001.safetensors: damaged"):
            Checkpoint.open(path).read("w")
