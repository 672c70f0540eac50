"""What a checkpoint folder holds and whether it is whole: by its manifest and the lengths of its files, and by every
block on request. No tensor is built; a damaged folder tells all that is wrong with it and what is still known.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from llm.checkpoint.fragments import DTYPES, Fragment, read_blocks
from llm.checkpoint.reader import FORMAT, MANIFEST, VERSION, file_faults, read_manifest
from llm.checkpoint.store import coverage_faults
from llm.errors import DamagedFile

MOST_THREADS = 8
BLOCKS_AT_ONCE = 4096
"""Blocks that are handed to the threads together, so that the list of what waits stays short."""


class Held(NamedTuple):
    """What a checkpoint keeps of one parameter in one kind (master, exp_avg, ...)."""

    dtype: str
    fragments: int
    bytes: int


@dataclass(frozen=True)
class Damage:
    """A block whose bytes are not those that were written; `offset` counts from the start of the file."""

    file: str
    name: str
    kind: str
    offset: int
    bytes: int
    reason: str


@dataclass
class Survey:
    """A checkpoint folder. `faults` are lines that each name a file; without a readable manifest all else is empty."""

    path: Path
    faults: list[str] = field(default_factory=list)
    step: int | None = None
    version: int | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    """Bytes of each file as the manifest has them."""
    fragments: list[Fragment] = field(default_factory=list)
    """Those that hold any value."""

    @property
    def bytes(self) -> int:
        """Of all files but the manifest."""
        return sum(self.files.values())

    def held(self) -> dict[str, dict[str, Held]]:
        """What is kept of each parameter, by kind."""
        found: dict[str, dict[str, Held]] = {name: {} for name in self.shapes}
        for fragment in self.fragments:
            kinds = found.setdefault(fragment.name, {})
            before = kinds.get(fragment.kind, Held(fragment.dtype, 0, 0))
            kinds[fragment.kind] = Held(before.dtype, before.fragments + 1, before.bytes + n_bytes(fragment))
        return found

    def bytes_by_kind(self) -> dict[str, int]:
        """Bytes of values, master first."""
        sizes: Counter[str] = Counter()
        for fragment in self.fragments:
            sizes[fragment.kind] += n_bytes(fragment)
        return {kind: sizes[kind] for kind in sorted(sizes, key=lambda kind: (kind != "master", kind))}


def n_bytes(fragment: Fragment) -> int:
    """Bytes of the fragment's values."""
    return fragment.numel * DTYPES[fragment.dtype].itemsize


def survey(path: Path) -> Survey:
    """Look at the checkpoint folder `path`: its manifest against its digest, the files' lengths, and whether the
    fragments hold every element of every parameter once.
    """
    found = Survey(path)
    file = path / MANIFEST
    try:
        manifest = read_manifest(path)
        found.step, found.version, found.meta = int(manifest["step"]), manifest["version"], dict(manifest["meta"])
        found.files = {str(name): int(size) for name, size in manifest["files"].items()}
        shapes = {str(name): tuple(int(n) for n in shape) for name, shape in manifest["parameters"].items()}
        fragments = [Fragment.from_json(row) for row in manifest["fragments"]]
    except DamagedFile as error:
        found.faults.append(str(error))
        return found
    except (KeyError, TypeError, ValueError, AttributeError):
        found.faults.append(f"{file}: damaged: it has a digest, but not the fields of {FORMAT} {VERSION}")
        return found
    found.shapes = shapes
    found.faults += file_faults(path, found.files)
    unreadable = list(_unreadable(file, fragments, found.files))
    found.faults += unreadable
    if not unreadable:
        found.fragments = [fragment for fragment in fragments if fragment.numel]
        found.faults += [f"{file}: {line}" for line in coverage_faults(shapes, found.fragments)]
    return found


def _unreadable(file: Path, fragments: list[Fragment], files: dict[str, int]) -> Iterator[str]:
    """Fragments that no reader of this version could look up."""
    for fragment in fragments:
        what = f"{file}: {fragment.name} ({fragment.kind})"
        if fragment.dtype not in DTYPES:
            yield f"{what} is {fragment.dtype}; known are {', '.join(DTYPES)}"
        elif fragment.file not in files:
            yield f"{what} lies in {fragment.file}, which is no file of the checkpoint"
        elif len(fragment.block_parts()) != len(fragment.blocks):
            yield f"{what} has {len(fragment.blocks)} digests for {len(fragment.block_parts())} blocks"


def damaged_blocks(found: Survey, progress: Callable[[int], object] = lambda n_bytes: None) -> list[Damage]:
    """Read every block of every fragment and return those that differ from their digests, in the order of files.

    Blocks of a missing file are not among them: the survey has that fault already. `progress` is told the bytes of
    each block that has been read.
    """
    missing = {name for name in found.files if not (found.path / name).is_file()}
    fragments = sorted((f for f in found.fragments if f.file not in missing), key=lambda f: (f.file, f.offset))
    blocks = ((fragment, i) for fragment in fragments for i in range(len(fragment.blocks)))
    damages: list[Damage] = []
    threads = ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1))  # hashing and reading leave Python's lock
    try:
        while batch := list(islice(blocks, BLOCKS_AT_ONCE)):
            for size, damage in threads.map(lambda block: _check(found.path, *block), batch):
                progress(size)
                if damage is not None:
                    damages.append(damage)
    finally:
        threads.shutdown(cancel_futures=True)
    return damages


def _check(folder: Path, fragment: Fragment, i: int) -> tuple[int, Damage | None]:
    """(bytes of the block, what is wrong with it)."""
    part, width = fragment.block_parts()[i], DTYPES[fragment.dtype].itemsize
    offset, size = fragment.offset + (part.start - fragment.start) * width, (part.stop - part.start) * width
    try:
        for _ in read_blocks(folder, fragment, [i]):
            pass
    except DamagedFile as error:
        return size, Damage(fragment.file, fragment.name, fragment.kind, offset, size, str(error))
    return size, None
