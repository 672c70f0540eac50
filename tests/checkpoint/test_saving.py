"""Saving behind the training, with several ranks as threads: nothing of it is seen until all is well, and what fails
leaves the checkpoints before it."""

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llm.boxes import whole
from llm.checkpoint import store as store_module
from llm.checkpoint.fragments import OwnedValues, outline_file
from llm.checkpoint.host_copy import HostCopy
from llm.checkpoint.reader import Checkpoint, list_steps, newest_valid
from llm.checkpoint.store import CheckpointStore, SaveFailed
from llm.errors import UserError
from llm.parallel.launch.world import World
from tests.checkpoint.ranks import as_ranks

N = 1000
SHAPES = {"w": (N,)}
RANKS = 3
ALONE = World(0, 1, 0, torch.device("cpu"))


def owned_by(world: World, values: torch.Tensor) -> list[OwnedValues]:
    """This rank's third of a vector of N values."""
    start, stop = N * world.rank // RANKS, N * (world.rank + 1) // RANKS
    return [("w", "master", whole((N,)), start, values[start:stop])]


def at_a_boundary(store: CheckpointStore, world: World) -> int | None:
    """What the trainer does at every step boundary."""
    flags = store_module.gather_json(store.flags(), world)
    return store.advance() if store.due(*(sum(column) for column in zip(*flags, strict=True))) else None


class Disk:
    """Holds every write back until it is let go; chosen ranks then fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failing: tuple[int, ...] = ()) -> None:
        self.go = threading.Event()
        write = store_module.write_values

        def slow_write(path: Path, outline: Any, values: Any, to_stop: Callable[[], bool]) -> Any:
            if any(f"rank_{rank:05d}" in path.name for rank in failing):
                raise OSError(28, "No space left on device", str(path))
            while not self.go.wait(0.001):
                if to_stop():
                    break
            return write(path, outline, values, to_stop)

        monkeypatch.setattr(store_module, "write_values", slow_write)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_training_goes_on_and_changes_nothing_of_what_is_being_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)

    def rank(world: World) -> list[int | None]:
        store = CheckpointStore(tmp_path, world, keep=5, keep_best=False)
        values = torch.arange(N, dtype=torch.float32)
        store.begin(1, SHAPES, owned_by(world, values), {})
        store.wait_for_copy()
        values += 1  # the training
        seen = [at_a_boundary(store, world) for _ in range(3)]
        assert not [name for name in names(tmp_path) if name.startswith("step")]
        store_module.gather_json(None, world)
        disk.go.set()
        found = None
        while found is None:
            found = at_a_boundary(store, world)
        return [*seen, found, at_a_boundary(store, world)]

    assert as_ranks(monkeypatch, RANKS, rank) == [[None, None, None, 1, None]] * RANKS
    assert names(tmp_path) == ["step_00000001"]
    checkpoint = Checkpoint.open(tmp_path / "step_00000001")
    assert torch.equal(checkpoint.read("w"), torch.arange(N, dtype=torch.float32))


def test_a_copy_that_takes_its_time_is_waited_for_before_values_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copying, go = threading.Event(), threading.Event()
    take = HostCopy.take

    def slow_take(host: HostCopy, owned: list[OwnedValues]) -> tuple[list[torch.Tensor], Callable[[], None]]:
        copies, copy = take(host, owned)

        def slow_copy() -> None:
            copying.set()
            assert go.wait(60)
            copy()

        return copies, slow_copy

    monkeypatch.setattr(HostCopy, "take", slow_take)
    store, values = CheckpointStore(tmp_path, ALONE, keep=5, keep_best=False), torch.zeros(N)
    store.begin(1, SHAPES, [("w", "master", whole((N,)), 0, values)], {})
    assert copying.wait(60)

    def optimizer() -> None:
        store.wait_for_copy()
        values.add_(1)

    step = threading.Thread(target=optimizer)
    step.start()
    step.join(0.05)  # the forward and backward are over, the copy is not
    assert step.is_alive() and not values.any()
    go.set()
    step.join()
    store.finish()
    assert values.all() and torch.equal(Checkpoint.open(tmp_path / "step_00000001").read("w"), torch.zeros(N))


def test_a_second_save_waits_for_the_first_and_the_memory_is_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rank(world: World) -> int:
        store = CheckpointStore(tmp_path, world, keep=5, keep_best=False)
        store.prepare(owned_by(world, torch.ones(N)))
        places = {store._copy._flat.result().data_ptr()}
        for step in (1, 2, 3):
            store.begin(step, SHAPES, owned_by(world, torch.full((N,), float(step))), {})
            places.add(store._copy._flat.result().data_ptr())
        store.finish()
        return len(places)

    assert as_ranks(monkeypatch, RANKS, rank) == [1] * RANKS
    for step in (1, 2, 3):
        assert torch.equal(Checkpoint.open(tmp_path / f"step_{step:08d}").read("w"), torch.full((N,), float(step)))


def save_for_ever(folder: Path, step: int) -> None:
    store = CheckpointStore(folder, ALONE, keep=2, keep_best=False)
    while True:
        store.begin(step, {"w": (N,)}, [("w", "master", whole((N,)), 0, torch.full((N,), float(step)))], {})
        store.finish()
        step += 1


def test_a_kill_at_any_moment_leaves_whole_checkpoints(tmp_path: Path) -> None:
    draw = random.Random(0)
    left_something, last = 0, 0
    for _ in range(20):
        child = os.fork()
        if child == 0:
            try:
                save_for_ever(tmp_path, last + 1)
            finally:
                os._exit(1)
        try:
            while not (newest := list_steps(tmp_path)) or newest[0][0] < last + 3:
                assert os.waitpid(child, os.WNOHANG) == (0, 0), "it ended by itself"
                time.sleep(0.001)
            time.sleep(draw.uniform(0, 0.02))
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        checkpoint, skipped = newest_valid(tmp_path)
        assert checkpoint is not None and not skipped
        assert torch.equal(checkpoint.read("w"), torch.full((N,), float(checkpoint.step)))
        assert checkpoint.step >= last + 3
        last = checkpoint.step
        left_something += any(path.name.startswith(".") for path in tmp_path.iterdir())
        CheckpointStore(tmp_path, ALONE, keep=2, keep_best=False).clean()
        assert all(path.name.startswith("step_") for path in tmp_path.iterdir())
    assert left_something, "no kill met a save, so nothing was shown"


@pytest.mark.parametrize("waiting", [True, False], ids=["at the next save", "at a boundary"])
def test_a_rank_that_cannot_write_is_told_by_all_and_the_last_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waiting: bool
) -> None:
    def first(world: World) -> None:
        CheckpointStore(tmp_path, world, keep=1, keep_best=False).save(1, SHAPES, owned_by(world, torch.ones(N)), {})

    as_ranks(monkeypatch, RANKS, first)
    disk = Disk(monkeypatch, failing=(1,))
    if waiting:
        disk.go.set()

    def rank(world: World) -> str:
        store = CheckpointStore(tmp_path, world, keep=1, keep_best=False)
        store.begin(2, SHAPES, owned_by(world, torch.zeros(N)), {})
        with pytest.raises(SaveFailed) as raised:
            if waiting:
                store.begin(3, SHAPES, owned_by(world, torch.zeros(N)), {})
            while True:  # the others stop writing for it: the disk never lets them go
                at_a_boundary(store, world)
        assert raised.value.agreed and store.finish() is None
        return str(raised.value)

    reported = as_ranks(monkeypatch, RANKS, rank)
    assert set(reported) == {reported[0]} and "No space left on device" in reported[0] and "(rank 1)" in reported[0]
    assert names(tmp_path) == ["step_00000001"]
    assert torch.equal(Checkpoint.open(tmp_path / "step_00000001").read("w"), torch.ones(N))


def test_a_commit_that_fails_is_told_by_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_manifest(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(store_module, "write_file", no_manifest)

    def rank(world: World) -> None:
        store = CheckpointStore(tmp_path, world, keep=1, keep_best=False)
        store.begin(2, SHAPES, owned_by(world, torch.zeros(N)), {})
        with pytest.raises(SaveFailed, match=r"No space left on device.*manifest.json"):
            while True:
                at_a_boundary(store, world)

    as_ranks(monkeypatch, RANKS, rank)
    assert names(tmp_path) == []


def test_what_does_not_hold_every_element_is_no_matter_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rank(world: World) -> None:
        store = CheckpointStore(tmp_path, world, keep=1, keep_best=False)
        store.begin(2, SHAPES, owned_by(world, torch.zeros(N)) if world.rank else [], {})
        with pytest.raises(UserError, match="misses 0 to 333") as raised:
            store.finish()
        assert not isinstance(raised.value, SaveFailed)

    as_ranks(monkeypatch, RANKS, rank)


BLOCK = 4096


def needed_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """What the three ranks' checkpoint takes, in whole blocks of a file system."""

    def rank(world: World) -> None:
        CheckpointStore(tmp_path, world, keep=1, keep_best=False).save(1, SHAPES, owned_by(world, torch.ones(N)), {})

    as_ranks(monkeypatch, RANKS, rank)
    files = list((tmp_path / "step_00000001").iterdir())
    assert len(files) == RANKS + 1
    return sum(-(-file.stat().st_size // BLOCK) * BLOCK for file in files)


@pytest.mark.parametrize("missing", [0, 1])
def test_what_is_free_is_compared_with_what_all_ranks_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: int
) -> None:
    needed = needed_bytes(tmp_path, monkeypatch)
    disk = SimpleNamespace(f_frsize=BLOCK, f_blocks=10**9, f_bavail=needed // BLOCK - missing)
    monkeypatch.setattr(os, "statvfs", lambda path: disk)

    def rank(world: World) -> None:
        store = CheckpointStore(tmp_path, world, keep=1, keep_best=False)
        store.save(2, SHAPES, owned_by(world, torch.zeros(N)), {})

    if missing:
        with pytest.raises(SaveFailed, match=rf"checkpoint of step 2 needs {needed:,} bytes, {needed - BLOCK:,} are"):
            as_ranks(monkeypatch, RANKS, rank)
    else:
        as_ranks(monkeypatch, RANKS, rank)
    assert names(tmp_path) == ["step_00000001" if missing else "step_00000002"]


def test_a_file_holds_little_beside_the_values() -> None:
    """At most 2 % more, of which the header is all."""
    values = torch.zeros(1 << 16)
    owned = [(f"layers.{i}.attention.wq.weight", "exp_avg", ((0, 1 << 16),), 0, values) for i in range(9)]
    outline = outline_file("rank_00000.safetensors", owned)
    assert outline.bytes <= 1.02 * 9 * 4 * values.numel()


def test_a_want_of_memory_names_the_key_that_does_without(tmp_path: Path) -> None:
    huge = torch.zeros(1).expand(1 << 60)  # an address space has no room for a copy
    store = CheckpointStore(tmp_path, ALONE, keep=1, keep_best=False)
    store.prepare([("w", "master", whole((1 << 60,)), 0, huge)])
    with pytest.raises(UserError, match="use checkpoint.asynchronous=false"):
        store.begin(1, {"w": (1,)}, [("w", "master", whole((1,)), 0, torch.zeros(1))], {})
