"""Run under torchrun: save and load one training state by this project, by torch and by DeepSpeed, in turn.

    torchrun --nproc_per_node 2 tools/benchmarks/saving_job.py compare TASK OUT
    torchrun --nproc_per_node 2 tools/benchmarks/saving_job.py read TASK OUT

TASK is a JSON file: config (a RunConfig), folder (where checkpoints go), rounds; for `read` also checkpoints, the paths
of those of which each rank is to read its part, and of which the bytes are counted.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from llm.checkpoint.reader import Checkpoint
from llm.checkpoint.store import CheckpointStore
from llm.errors import UserError
from llm.parallel.collectives import gather_json, sum_over_ranks
from llm.parallel.engine.engine import Engine
from llm.parallel.grid import make_grid
from llm.parallel.launch import process
from llm.parallel.launch.world import World
from llm.train.config import RunConfig, check_layout
from llm.train.run import build_engine
from tools.benchmarks.parallel_job import batch_of

Metrics = dict[str, float]
BLOCK = 16 << 20
"""In which reading beyond a share is reported."""
ALONE = 4
"""Steps of a round that nothing else runs beside."""
BEFORE_SAVE = 2
"""Steps between the getting of host memory and the first save: as a run with checkpoint.interval=3."""


def io_bytes(which: str) -> int:
    """Bytes that this process has read ("rchar") or written ("wchar") by system calls, from the page cache or not."""
    rows = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(rows[which])


def now() -> float:
    """Seconds, after all work of a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(action: Callable[[], Any]) -> float:
    """How long `action` takes."""
    began = now()
    action()
    return now() - began


class Bench:
    """An engine that trains, and every way to save and load its state."""

    def __init__(self, task: dict[str, Any], world: World) -> None:
        config = RunConfig.model_validate(task["config"])
        self.world = world
        self.grid = make_grid(world, check_layout(config, world.size))
        self.engine: Engine = build_engine(config, self.grid)
        self.rounds: int = task.get("rounds", 0)
        self.folder = Path(task["folder"])
        train = config.train
        self._batch = batch_of(self.grid, config.model.vocab_size, train.global_batch_size, train.seq_len, 1)
        self._saves = 0
        for _ in range(2):  # the first makes the optimizer's state
            self.train()

    def train(self) -> None:
        """A step."""
        self.engine.step(self._batch, self._batch.counts, 1e-4)

    def state(self) -> dict[str, Tensor]:
        """What the owned fragments lie in, each storage as one flat tensor; keys differ between ranks.

        Whole storages, because torch copies a view of part of one before it writes it.
        """
        flats: dict[int, Tensor] = {}
        for fragment in self.engine.state.owned_fragments():
            storage = fragment.values.untyped_storage()
            flats.setdefault(storage.data_ptr(), fragment.values.new_empty(0).detach().set_(storage))
        return {f"rank{self.world.rank}.{i}": flat for i, flat in enumerate(flats.values())}

    def owned_bytes(self) -> int:
        """Of this rank's part of the state."""
        return sum(4 * fragment.values.numel() for fragment in self.engine.state.owned_fragments())

    def meet(self) -> None:
        """All ranks, with nothing left for the disk to write."""
        if self.world.is_main:
            os.sync()
        dist.barrier()

    def remove(self, name: str) -> None:
        """A contestant's checkpoints."""
        dist.barrier()
        if self.world.is_main:
            shutil.rmtree(self.folder / name, ignore_errors=True)
        dist.barrier()

    def in_turn(self, contestants: Mapping[str, Callable[[], Metrics]]) -> dict[str, dict[str, list[float]]]:
        """The metrics of each contestant in each round: of the slowest rank, but bytes of all."""
        found: dict[str, list[Metrics]] = {name: [] for name in contestants}
        for number in range(self.rounds):
            for name in contestants if number % 2 == 0 else reversed(list(contestants)):
                self.meet()
                found[name].append(contestants[name]())
        everyone = gather_json(found, self.world)
        return {
            name: {
                key: [
                    (sum if key == "bytes" else max)(ranks[name][i][key] for ranks in everyone)
                    for i in range(self.rounds)
                ]
                for key in found[name][0]
            }
            for name in found
        }

    # ---- saving

    def saves(self) -> dict[str, dict[str, list[float]]]:
        """Every way of saving."""
        self._copy = torch.empty(self._n_elements(), pin_memory=torch.cuda.is_available()).zero_()
        self._store = self._new_store()
        self._store.prepare(self.engine.state.owned_fragments())
        self._stager = DefaultStager(StagingOptions(False, False, False, False))
        self._group = dist.new_group(backend="gloo")  # its thread's collectives must not meet those of the training
        contestants: dict[str, Callable[[], Metrics]] = {
            "training alone": self._alone,
            "memory copy": self._memory_copy,
            "ours, blocking": self._ours_blocking,
            "ours, behind, first, unprepared": lambda: self._ours_behind(self._new_store()),
            "ours, behind, first": self._ours_behind_first,
            "ours, behind, later": lambda: self._ours_behind(self._store),
            "DCP, blocking": self._dcp_blocking,
            "DCP, behind": lambda: self._dcp_behind(None),
            "DCP, behind, memory kept": lambda: self._dcp_behind(self._stager),
            "DeepSpeed, blocking": self._deepspeed,
        }
        for name in ("ours, behind, later", "DCP, behind, memory kept"):  # so that each has its memory
            contestants[name]()
        found = self.in_turn(contestants)
        self._stager.close()
        del self._copy, self._store, self._stager
        return found

    def _n_elements(self) -> int:
        return sum(flat.numel() for flat in self.state().values())

    def _new_store(self) -> CheckpointStore:
        return CheckpointStore(self.folder / "ours", self.world, keep=1, keep_best=False)

    def _boundary(self, *flags: bool) -> list[float]:
        """What ranks exchange between two steps, saving or not."""
        return sum_over_ranks([float(flag) for flag in flags] or [0.0, 0.0], self.world)

    def _alone(self) -> Metrics:
        def steps() -> None:
            for _ in range(ALONE):
                self._boundary()
                self.train()

        return {"step": seconds(steps) / ALONE}

    def _memory_copy(self) -> Metrics:
        flats = list(self.state().values())
        places = self._copy.split([flat.numel() for flat in flats])

        def copy() -> None:
            for place, flat in zip(places, flats, strict=True):
                place.copy_(flat, non_blocking=True)

        return {"stall": seconds(copy)}

    def _begin(self, store: CheckpointStore, in_background: bool) -> None:
        self._saves += 1
        engine = self.engine
        meta = {"optimizer_scalars": engine.state.scalars()}
        store.begin(self._saves, engine.state.shapes, engine.state.owned_fragments(), meta, None, in_background)

    def _ours_blocking(self) -> Metrics:
        store = self._new_store()

        def save() -> None:
            self._begin(store, in_background=False)
            store.finish()

        before = io_bytes("wchar")
        found = {"stall": seconds(save), "bytes": float(io_bytes("wchar") - before)}
        self.remove("ours")
        return found

    def _ours_behind_first(self) -> Metrics:
        """The first save of a run, which has got its memory behind the training."""
        store = self._new_store()
        preparing = seconds(lambda: store.prepare(self.engine.state.owned_fragments()))
        for _ in range(BEFORE_SAVE):
            self.train()
        self.meet()
        return self._ours_behind(store) | {"preparing": preparing}

    def _ours_behind(self, store: CheckpointStore) -> Metrics:
        def due() -> bool:
            return store.due(*self._boundary(*store.flags()))

        waited = 0.0

        def wait() -> None:
            nonlocal waited
            waited += seconds(store.wait_for_copy)

        self.engine.before_change = wait
        found = self._behind(lambda: self._begin(store, in_background=True), due, store.advance)
        self.engine.before_change = store.wait_for_copy
        self.remove("ours")
        return found | {"stall": found["stall"] + waited, "waited": waited}

    def _behind(
        self, begin: Callable[[], Any], due: Callable[[], bool], advance: Callable[[], int | None]
    ) -> Metrics:
        """Train until a save that is begun now is done. stall: seconds in the calls of the library; step: of a step
        meanwhile; elapsed: of everything; steps: their number.
        """
        began = now()
        stall = seconds(begin)
        in_steps, steps = 0.0, 0
        while True:
            if due():
                called = now()
                step = advance()
                stall += now() - called
                if step is not None:
                    break
            in_steps += seconds(self.train)
            steps += 1
        return {"stall": stall, "step": in_steps / max(steps, 1), "steps": steps, "elapsed": now() - began}

    def _dcp_blocking(self) -> Metrics:
        state, before = self.state(), io_bytes("wchar")
        stall = seconds(lambda: dcp.save(state, checkpoint_id=self.folder / "dcp"))
        written = io_bytes("wchar") - before
        self.remove("dcp")
        return {"stall": stall, "bytes": float(written)}

    def _dcp_behind(self, stager: DefaultStager | None) -> Metrics:
        """stager: keeps its memory from one save to the next, as the default does not."""
        state = self.state()
        future: Future[Any]

        def begin() -> None:
            nonlocal future
            response: Any = dcp.async_save(
                state, checkpoint_id=self.folder / "dcp", process_group=self._group, async_stager=stager
            )
            future = getattr(response, "upload_completion", response)

        def finish() -> int:
            future.result()
            return 0

        found = self._behind(begin, lambda: self._boundary(not future.done(), False)[0] == 0, finish)
        self.remove("dcp")
        return found

    def _deepspeed(self) -> Metrics:
        """DeepSpeed leaves the flushing to the system, so it is timed without and with it."""
        before = io_bytes("wchar")
        stall = seconds(self._save_by_deepspeed)
        written = io_bytes("wchar") - before
        flush = seconds(lambda: flush_below(self.folder / "deepspeed") if self.world.is_main else None)
        self.remove("deepspeed")
        return {"stall": stall, "flushed": stall + flush, "bytes": float(written)}

    def _save_by_deepspeed(self) -> None:
        with process.stdout_to_nowhere():
            self.engine._deepspeed.save_checkpoint(str(self.folder / "deepspeed"), tag="step")

    # ---- loading

    def loads(self, kept: Path) -> dict[str, dict[str, list[float]]]:
        """Every way of loading one checkpoint each, warm in the page cache; ours stays as `kept`."""
        store = self._new_store()
        self._begin(store, in_background=False)
        store.finish()
        move(store.path(self._saves), kept, self.world)
        self.remove("ours")
        dcp.save(self.state(), checkpoint_id=self.folder / "dcp")
        self._save_by_deepspeed()
        self._expected = [fragment.values.clone() for fragment in self.engine.state.fragments()]
        found = self.in_turn(
            {
                "ours": lambda: self._loaded("ours", lambda: self._load_ours(store, kept)),
                "DCP": lambda: self._loaded("DCP", self._load_by_dcp),
                "DeepSpeed": lambda: self._loaded("DeepSpeed", self._load_by_deepspeed),
            }
        )
        for name in ("dcp", "deepspeed"):
            self.remove(name)
        return found

    def _loaded(self, name: str, load: Callable[[], None]) -> Metrics:
        """Time a load into a state that was cleared. UserError where the state is not what was saved."""
        for fragment in self.engine.state.fragments():
            fragment.values.zero_()
        self.engine.finish_load()
        dist.barrier()
        taken = seconds(load)
        for fragment, expected in zip(self.engine.state.fragments(), self._expected, strict=True):
            if not torch.equal(fragment.values, expected):
                raise UserError(f"{name} does not load what was saved: {fragment.name} ({fragment.kind}) differs")
        return {"stall": taken}

    def _load_ours(self, store: CheckpointStore, path: Path) -> None:
        engine = self.engine

        def read(checkpoint: Checkpoint) -> Callable[[], None]:
            engine.prepare_load(checkpoint.kinds(), checkpoint.meta["optimizer_scalars"])
            checkpoint.fill(
                (name, kind, box, start, start + values.numel(), values)
                for name, kind, box, start, values in engine.state.fragments()
            )
            return engine.finish_load

        store.load_exactly(path, read)

    def _load_by_dcp(self) -> None:
        dcp.load(self.state(), checkpoint_id=self.folder / "dcp")
        self.engine.finish_load()

    def _load_by_deepspeed(self) -> None:
        with process.stdout_to_nowhere():
            self.engine._deepspeed.load_checkpoint(str(self.folder / "deepspeed"), tag="step")

    def count_read(self, path: Path) -> list[Metrics]:
        """Of each rank: bytes of its share, bytes read for it without the manifest, and the most that a tensor was
        read beyond its share, in blocks.
        """
        checkpoint = Checkpoint.open(path)
        share = total = most = 0
        counting = -io_bytes("rchar") + io_bytes("rchar")  # what asking for the number reads
        for name, kind, box, start, values in self.engine.state.fragments():
            before = io_bytes("rchar")
            checkpoint.read(name, kind, box=box, start=start, stop=start + values.numel())
            read = io_bytes("rchar") - before - counting
            share += 4 * values.numel()
            total += read
            most = max(most, read - 4 * values.numel())
        return gather_json({"share": share, "read": total, "most": most / BLOCK}, self.world)


def flush_below(folder: Path) -> None:
    """Every file to the disk, whoever wrote it."""
    for path in folder.rglob("*"):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def move(source: Path, target: Path, world: World) -> None:
    """Rename a folder for all ranks."""
    if world.is_main:
        os.replace(source, target)
    dist.barrier()


def main() -> None:
    what, task, out = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    process.quiet_libraries()
    world = process.start(600, 1)
    bench = Bench(task, world)
    found: Any
    if what == "compare":
        found = {"state": sum_over_ranks([bench.owned_bytes()], world)[0], "saves": bench.saves()}
        found["loads"] = bench.loads(Path(task["kept"]))
    else:
        found = [bench.count_read(Path(path)) for path in task["checkpoints"]]
    if world.is_main:
        out.write_text(json.dumps(found))


if __name__ == "__main__":
    process.run(main)
