"""The `checkpoints` folder of a run: atomic saving by all ranks, retention, and choosing what to resume from.

A checkpoint comes to life in one rename. Before that: every rank writes its own file into a hidden folder and flushes
it, the ranks exchange their records, rank 0 checks that the records cover every tensor exactly once and writes the
manifest. A kill at any moment leaves either the whole checkpoint or a hidden folder that the next start removes.

Copying, writing and committing may go on behind the training: threads do it in two stages, and between those the ranks
meet in `advance`, at a step boundary where all have finished theirs.
"""

import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llm.atomic import sync, write_file
from llm.boxes import Box, box_shape
from llm.checkpoint.fragments import VERSION, FileOutline, Fragment, GivenUp, OwnedValues, outline_file, write_values
from llm.checkpoint.host_copy import HostCopy, start_work
from llm.checkpoint.reader import FORMAT, MANIFEST, Checkpoint, list_steps, seal
from llm.errors import DamagedFile, UserError
from llm.parallel.collectives import agreed_error, all_or_none, gather_json, main_decides
from llm.parallel.launch.world import World
from llm.paths import free_space

HIDDEN = ".unfinished-"
Load = Callable[[Checkpoint], Callable[[], None]]


class SaveFailed(UserError):
    """A checkpoint could not be written, for want of space perhaps. Those before it are intact."""


@dataclass
class _Save:
    """A save on its way: this rank's part of its present stage."""

    manifest: dict[str, Any]
    best_step: int | None
    in_background: bool
    give_up: threading.Event
    task: Future[Any]
    beside: Mapping[str, bytes]
    """Files that the manifest does not describe, by name."""
    copied: threading.Event
    """The values are needed no more where they were."""
    committing: bool = False

    @property
    def step(self) -> int:
        return int(self.manifest["step"])


class CheckpointStore:
    """Checkpoints of one run in `folder`; every method that says so is called by all ranks together.

    Retention: the newest `keep` stay, the best one if `keep_best`, and every one whose step `keep_every` divides. The
    others are dropped after a commit and never before.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        *,
        keep: int,
        keep_best: bool,
        keep_every: int | None = None,
        cut: Mapping[str, int | None] | None = None,
    ) -> None:
        """cut: the dimension of each parameter that tensor parallelism would cut, for stripes (see plan_file)."""
        self.folder = folder
        self.cut = cut or {}
        self.world = world
        self.keep = keep
        self.keep_best = keep_best
        self.keep_every = keep_every
        self._copy = HostCopy()
        self._save: _Save | None = None
        self._cut: list[tuple[str, str, Box, int, int]] | None = None
        self._outline: tuple[FileOutline, int] | None = None

    def clean(self) -> None:
        """Remove what a killed save left behind (collective)."""

        def remove() -> None:
            for path in self.folder.glob(HIDDEN + "*"):
                shutil.rmtree(path)

        main_decides(remove, self.world)

    def save(
        self,
        step: int,
        shapes: dict[str, tuple[int, ...]],
        owned: Iterable[OwnedValues],
        meta: dict[str, Any],
        best_step: int | None = None,
    ) -> Path:
        """Write the checkpoint of `step` and commit it, while the caller waits (collective); see `begin`."""
        self.begin(step, shapes, owned, meta, best_step, in_background=False)
        self.finish()
        return self.path(step)

    def path(self, step: int) -> Path:
        """Where the checkpoint of `step` is, once it is committed."""
        return self.folder / f"step_{step:08d}"

    def prepare(self, owned: Iterable[OwnedValues]) -> None:
        """Get the host memory that `begin` will need for such values, behind the training."""
        self._copy.prepare(list(owned))

    def begin(
        self,
        step: int,
        shapes: dict[str, tuple[int, ...]],
        owned: Iterable[OwnedValues],
        meta: dict[str, Any],
        best_step: int | None = None,
        in_background: bool = True,
        beside: Mapping[str, bytes] | None = None,
    ) -> None:
        """Begin the checkpoint of `step`, after finishing the one before it (collective).

        `shapes` are those of whole parameters. Over all ranks each element of a (name, kind) is owned once.
        In_background copies the values into as much host memory and writes them from there: they must not change
        before `wait_for_copy` has returned. Without it they are written from where they are. best_step: that of the
        best checkpoint so far, for retention. beside: small files for the same folder, which the manifest does not
        describe, by name.
        SaveFailed on every rank where the file system has not the space that all files need together.
        """
        self.finish()
        owned = list(owned)
        outline, n_rows = self._outlined(owned, shapes)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "step": step,
            "parameters": {name: list(shape) for name, shape in shapes.items()},
            "meta": meta,
        }
        self._check_space(outline, n_rows, manifest)
        values: Iterable[Tensor]
        values, copy = self._copy.take(owned) if in_background else ((values for *_, values in owned), _nothing)
        work, give_up, copied = self._work(step), threading.Event(), threading.Event()

        def write() -> dict[str, Any]:
            try:
                copy()
            finally:
                copied.set()
            work.mkdir(parents=True, exist_ok=True)
            fragments = write_values(work / outline.name, outline, values, give_up.is_set)
            return {"file": outline.name, "is": outline.record.to_json(), "fragments": [f.to_json() for f in fragments]}

        task = start_work(write, in_background)
        self._save = _Save(manifest, best_step, in_background, give_up, task, beside or {}, copied)

    def wait_for_copy(self) -> None:
        """Return once the values of the save that has been begun may change. What failed meanwhile is reported by
        `advance`."""
        if self._save is not None:
            self._save.copied.wait()

    def _work(self, step: int) -> Path:
        return self.folder / f"{HIDDEN}step_{step:08d}"

    def _outlined(self, owned: list[OwnedValues], shapes: dict[str, tuple[int, ...]]) -> tuple[FileOutline, int]:
        """The outline of this rank's file, and about how long its rows in the manifest are: those of the last save
        where values are cut as then, as the training waits for this."""
        cut = [(name, kind, box, start, values.numel()) for name, kind, box, start, values in owned]
        if cut != self._cut:
            outline = outline_file(f"rank_{self.world.rank:05d}.safetensors", owned, shapes=shapes, cut=self.cut)
            rows = json.dumps([fragment.to_json() for fragment in outline.fragments])  # digests are as long while blank
            self._cut, self._outline = cut, (outline, len(rows))
        assert self._outline is not None
        return self._outline

    def _check_space(self, outline: FileOutline, n_rows: int, manifest: dict[str, Any]) -> None:
        disk = free_space(self.folder) if self.world.is_main else None
        empty = len(seal({**manifest, "files": {}, "fragments": []}))
        files_of_ranks = gather_json([outline.name, outline.record.to_json(), n_rows, empty, disk], self.world)
        *_, empty, disk = files_of_ranks[0]
        if disk is None:
            return
        block, free = disk
        files = {name: record for name, record, *_ in files_of_ranks}
        of_manifest = empty - len("{}") + len(json.dumps(files)) + sum(n for _, _, n, *_ in files_of_ranks)
        sizes = [of_manifest, *(record["bytes"] for record in files.values())]
        needed = sum(-(-size // block) * block for size in sizes)
        if needed > free:
            short = f"the checkpoint of step {manifest['step']} needs {needed:,} bytes, {free:,} are free"
            raise agreed_error(f"{self.folder}: {short}", SaveFailed)

    def flags(self) -> tuple[bool, bool]:
        """Whether this rank is at work on a save, and whether its part has failed: to be added up over ranks."""
        if self._save is None:
            return False, False
        done = self._save.task.done()
        return not done, done and self._save.task.exception() is not None

    def due(self, at_work: float, failed: float) -> bool:
        """Whether it is time for `advance`, from the sums of all ranks' flags: the same answer on every rank.

        Where another rank has failed, this one stops writing.
        """
        if self._save is None:
            return False
        if failed:
            self._save.give_up.set()
        return at_work == 0 or failed > 0

    def advance(self) -> int | None:
        """Take the save a stage further, after waiting for every rank's part of this one (collective).

        Returns its step once it is committed. SaveFailed on every rank when one could not write; UserError when the
        ranks do not own every element once.
        """
        save = self._save
        assert save is not None
        outcomes = gather_json(_outcome(save.task), self.world)
        failures = [(not why, rank, why, of_disk) for rank, (_, why, of_disk) in enumerate(outcomes) if why is not None]
        if failures:
            self._save = None
            main_decides(lambda: shutil.rmtree(self._work(save.step), ignore_errors=True), self.world)
            _, rank, why, of_disk = min(failures)  # of those that gave up for another one only where nobody says more
            where = f" (rank {rank})" if self.world.size > 1 else ""
            raise agreed_error(f"{why}{where}", SaveFailed if of_disk else UserError)
        if save.committing:
            self._save = None
            return save.step
        records = [record for record, *_ in outcomes]
        if self.world.is_main:
            save.task = start_work(lambda: self._commit(save, records), save.in_background)
        else:
            save.task = start_work(_nothing, in_background=False)
        save.committing = True
        return None

    def finish(self) -> int | None:
        """Bring the save that is on its way to its end, if there is one (collective); its step. Raises as `advance`."""
        step = None
        while self._save is not None:
            step = self.advance()
        return step

    def _commit(self, save: _Save, records: list[dict[str, Any]]) -> None:
        step = save.step
        work, final = self._work(step), self.path(step)
        rows = [row for record in records for row in record["fragments"]]
        shapes = {name: tuple(shape) for name, shape in save.manifest["parameters"].items()}
        for fault in coverage_faults(shapes, map(Fragment.from_json, rows)):
            raise UserError(f"refusing to commit a checkpoint: {fault}")
        files = {record["file"]: record["is"] for record in records}
        for name, content in save.beside.items():
            write_file(work / name, content)
        write_file(work / MANIFEST, seal({**save.manifest, "files": files, "fragments": rows}))
        replaced = self.folder / f"{HIDDEN}replaced-{step:08d}"
        if final.exists():
            os.replace(final, replaced)
        os.replace(work, final)
        sync(self.folder)
        shutil.rmtree(replaced, ignore_errors=True)
        try:
            self._prune(save.best_step)
        except OSError as error:
            raise OSError(f"{final} is saved, but an older one cannot be removed: {error}") from None

    def _prune(self, best_step: int | None) -> None:
        for i, (step, path) in enumerate(list_steps(self.folder)):
            best = self.keep_best and step == best_step
            for_good = self.keep_every is not None and step % self.keep_every == 0
            if i >= self.keep and not best and not for_good:
                # a rename takes it off the list at once; a kill while it is deleted leaves nothing that looks whole
                doomed = self.folder / f"{HIDDEN}pruned-{step:08d}"
                os.replace(path, doomed)
                shutil.rmtree(doomed)

    def load_newest(self, load: Load) -> tuple[Checkpoint | None, list[str]]:
        """Call `load(checkpoint)` with the newest checkpoint that every rank can read in full (collective).

        Returns it with one line per newer checkpoint that was skipped. UserError when there are checkpoints but none
        is valid: a damaged run never starts again from step 0 by itself.
        """
        skipped: list[str] = []
        damaged: list[Path] = []
        for path in main_decides(lambda: [str(folder) for _, folder in list_steps(self.folder)], self.world):
            try:
                checkpoint = self.load_exactly(Path(path), load)
            except DamagedFile as error:
                skipped.append(str(error))
                damaged.append(Path(path))
                continue
            main_decides(lambda: self._set_aside(damaged), self.world)
            return checkpoint, skipped
        if skipped:
            raise agreed_error(f"{self.folder}: no valid checkpoint among {len(skipped)}; the newest: {skipped[0]}")
        return None, []

    def _set_aside(self, damaged: list[Path]) -> None:
        """Rename damaged checkpoints, so that they neither count as kept ones nor stand in the way of their step."""
        for path in damaged:
            aside = path.with_name(f"damaged_{path.name}")
            if aside.is_dir() and not aside.is_symlink():
                shutil.rmtree(aside, ignore_errors=True)
            else:
                aside.unlink(missing_ok=True)
            os.replace(path, aside)

    def load_exactly(self, path: Path, load: Load) -> Checkpoint:
        """Open the checkpoint at `path` and call `load(checkpoint)`, which reads, and returns a function that applies.

        Nothing is applied unless all ranks have read all of theirs (collective). Tensors that `load` reads straight
        into hold anything after an error, until another load has filled them.
        """

        def read() -> tuple[Checkpoint, Callable[[], None]]:
            checkpoint = Checkpoint.open(path)
            return checkpoint, load(checkpoint)

        checkpoint, apply = all_or_none(read, self.world)
        apply()
        return checkpoint


def _outcome(task: Future[Any]) -> list[Any]:
    """[result, what went wrong or None, whether that was the disk], after waiting for it; anything but bad luck with
    files is raised.
    """
    error = task.exception()
    if error is None:
        return [task.result(), None, False]
    if isinstance(error, GivenUp):
        return [None, "", True]
    if not isinstance(error, (OSError, UserError)):
        raise error
    return [None, str(error), isinstance(error, OSError)]


def _nothing() -> None:
    return None


def coverage_faults(shapes: dict[str, tuple[int, ...]], fragments: Iterable[Fragment]) -> Iterator[str]:
    """A line for each (parameter, kind) whose elements are not all there once. Every parameter needs its master; of a
    state that it has, it needs every element. Which states a parameter has depends on its optimizer.
    """
    held: dict[tuple[str, str], dict[Box, list[tuple[int, int]]]] = {(name, "master"): {} for name in shapes}
    for fragment in fragments:
        if fragment.numel:
            boxes = held.setdefault((fragment.name, fragment.kind), {})
            boxes.setdefault(fragment.box, []).append((fragment.start, fragment.start + fragment.numel))
    for (name, kind), boxes in held.items():
        fault = _fault(shapes[name], boxes) if name in shapes else "belongs to no parameter"
        if fault:
            yield f"{name} ({kind}) {fault}"


def _fault(shape: tuple[int, ...], boxes: dict[Box, list[tuple[int, int]]]) -> str | None:
    """What keeps the flat ranges inside boxes from being every element of `shape` once, if anything does.

    The boxes have to be all cells of a grid, so that no two of them need be compared.
    """
    for box, ranges in boxes.items():
        if len(box) != len(shape):
            return f"has a box {box} of a shape {shape}"
        if fault := _not_tiled(ranges, math.prod(box_shape(box))):
            return f"{fault} of the elements of box {box}"
    if math.prod(shape) == 0:
        return None
    cells = 1
    for i, n in enumerate(shape):
        ranges = list({box[i] for box in boxes})
        if fault := _not_tiled(ranges, n):
            return f"{fault} of dimension {i}"
        cells *= len(ranges)
    return None if len(boxes) == cells else f"has {len(boxes)} of {cells} boxes"


def _not_tiled(ranges: list[tuple[int, int]], total: int) -> str | None:
    """What is missing or surplus in ranges that should be 0 to `total`, one after the other."""
    at = 0
    for start, stop in sorted(ranges):
        if start != at:
            return f"misses {at} to {start}" if start > at else f"holds {start} to {min(at, stop)} twice"
        at = stop
    return None if at == total else f"is covered up to {at} of {total}"
