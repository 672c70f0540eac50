"""The `checkpoints` folder of a run: atomic saving by all ranks, retention, and choosing what to resume from.

A checkpoint comes to life in one rename. Before that: every rank writes its own file into a hidden folder and flushes
it, the ranks exchange their records, rank 0 checks that the records cover every tensor exactly once and writes the
manifest. A kill at any moment leaves either the whole checkpoint or a hidden folder that the next start removes.
"""

import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from llm.atomic import sync, write_file
from llm.boxes import Box, box_shape
from llm.checkpoint.fragments import Fragment, Piece, write_fragments
from llm.checkpoint.reader import FORMAT, MANIFEST, VERSION, Checkpoint, list_steps, seal
from llm.errors import DamagedFile, UserError
from llm.parallel.collectives import agreed_error, all_or_none, gather_json, main_decides
from llm.parallel.launch import World

HIDDEN = ".unfinished-"
Load = Callable[[Checkpoint], Callable[[], None]]


class CheckpointStore:
    """Checkpoints of one run in `folder`; every method that says so is called by all ranks together."""

    def __init__(self, folder: Path, world: World, *, keep: int, keep_best: bool) -> None:
        self.folder = folder
        self.world = world
        self.keep = keep
        self.keep_best = keep_best

    def clean(self) -> None:
        """Remove what a killed save left behind (collective)."""

        def remove() -> None:
            for path in self.folder.glob(HIDDEN + "*"):
                shutil.rmtree(path)

        main_decides(remove, self.world)

    def save(
        self, step: int, shapes: dict[str, tuple[int, ...]], pieces: Iterable[Piece], meta: dict[str, Any]
    ) -> Path:
        """Write the checkpoint of `step` and commit it (collective).

        `shapes` are those of whole parameters. Over all ranks the pieces hold every element of each (name, kind) once.
        UserError on every rank when they do not or one rank could not write.
        """
        final = self.folder / f"step_{step:08d}"
        work = self.folder / f"{HIDDEN}step_{step:08d}"
        world = self.world

        def write() -> dict[str, Any]:
            work.mkdir(parents=True, exist_ok=True)
            path = work / f"rank_{world.rank:05d}.safetensors"
            fragments = write_fragments(path, pieces)
            return {"file": path.name, "bytes": path.stat().st_size, "fragments": [f.to_json() for f in fragments]}

        records = gather_json(all_or_none(write, world), world)

        def commit() -> None:
            if not world.is_main:
                return
            rows = [row for record in records for row in record["fragments"]]
            for fault in coverage_faults(shapes, map(Fragment.from_json, rows)):
                raise UserError(f"refusing to commit a checkpoint: {fault}")
            manifest = {
                "format": FORMAT,
                "version": VERSION,
                "step": step,
                "parameters": {name: list(shape) for name, shape in shapes.items()},
                "files": {record["file"]: record["bytes"] for record in records},
                "fragments": rows,
                "meta": meta,
            }
            write_file(work / MANIFEST, seal(manifest))
            replaced = self.folder / f"{HIDDEN}replaced-{step:08d}"
            if final.exists():
                os.replace(final, replaced)
            os.replace(work, final)
            sync(self.folder)
            shutil.rmtree(replaced, ignore_errors=True)

        all_or_none(commit, world)
        return final

    def prune(self, best_step: int | None) -> None:
        """Drop all but the newest `keep` checkpoints and the best one (collective). Called after a commit only."""
        main_decides(lambda: self._prune(best_step), self.world)

    def _prune(self, best_step: int | None) -> None:
        for i, (step, path) in enumerate(list_steps(self.folder)):
            if i >= self.keep and not (self.keep_best and step == best_step):
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
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(path, aside)

    def load_exactly(self, path: Path, load: Load) -> Checkpoint:
        """Open the checkpoint at `path` and call `load(checkpoint)`, which reads, and returns a function that applies.

        Nothing is applied unless all ranks have read all of theirs (collective).
        """

        def read() -> tuple[Checkpoint, Callable[[], None]]:
            checkpoint = Checkpoint.open(path)
            return checkpoint, load(checkpoint)

        checkpoint, apply = all_or_none(read, self.world)
        apply()
        return checkpoint


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
    """What is missing or surplus in ranges that should be 0 to `total` in pieces."""
    at = 0
    for start, stop in sorted(ranges):
        if start != at:
            return f"misses {at} to {start}" if start > at else f"holds {start} to {min(at, stop)} twice"
        at = stop
    return None if at == total else f"is covered up to {at} of {total}"
