"""What a checkpoint folder holds and whether it is whole: by its manifest and the lengths of its files, and by every
block on request. No tensor is built; of a damaged folder all that is wrong is listed and what is still known.
"""

import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from llm.checkpoint.fragments import VERSION, FileRecord, Fragment, check_header, opened, read_block
from llm.checkpoint.reader import MANIFEST, folder_faults, fragment_faults, is_there, read_manifest
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
    """A block whose bytes are not those that were written; `offset` counts from the start of the file.

    The header of a file is a block too, without a name and of the kind "header".
    """

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
    files: dict[str, FileRecord] = field(default_factory=dict)
    """Each file as the manifest has it."""
    fragments: list[Fragment] = field(default_factory=list)
    """Those that hold any value."""

    @property
    def bytes(self) -> int:
        """Of all files but the manifest."""
        return sum(record.bytes for record in self.files.values())

    def held(self) -> dict[str, dict[str, Held]]:
        """What is kept of each parameter, by kind."""
        found: dict[str, dict[str, Held]] = {name: {} for name in self.shapes}
        for fragment in self.fragments:
            kinds = found.setdefault(fragment.name, {})
            before = kinds.get(fragment.kind, Held(fragment.dtype, 0, 0))
            kinds[fragment.kind] = Held(before.dtype, before.fragments + 1, before.bytes + fragment.bytes)
        return found

    def bytes_by_kind(self) -> dict[str, int]:
        """Bytes of values, master first."""
        sizes: Counter[str] = Counter()
        for fragment in self.fragments:
            sizes[fragment.kind] += fragment.bytes
        return {kind: sizes[kind] for kind in sorted(sizes, key=lambda kind: (kind != "master", kind))}


def survey(path: Path) -> Survey:
    """Look at the checkpoint folder `path`: its manifest against its digest, the files' lengths, and whether the
    fragments hold every element of every parameter once.
    """
    try:
        manifest = read_manifest(path)
    except DamagedFile as error:
        return Survey(path, [str(error)])
    found = Survey(path, list(folder_faults(path, manifest)), manifest.step, manifest.version, manifest.meta)
    found.shapes, found.files = manifest.shapes, manifest.files
    unreadable = list(fragment_faults(path, manifest))
    found.faults += unreadable
    if not unreadable:
        found.fragments = [fragment for fragment in manifest.fragments if fragment.numel]
        found.faults += [f"{path / MANIFEST}: {line}" for line in coverage_faults(found.shapes, found.fragments)]
    return found


def damaged_blocks(found: Survey, progress: Callable[[int], object] = lambda n_bytes: None) -> list[Damage]:
    """Read every header and every block of every fragment and return those that differ from their digests, headers
    first and then in the order of files.

    Blocks of a missing file are not among them: the survey has that fault already. `progress` gets the bytes of
    each block of values that has been read.
    """
    there = {name: record for name, record in found.files.items() if is_there(found.path, name)}
    fragments = sorted((f for f in found.fragments if f.file in there), key=lambda f: (f.file, f.offset))
    blocks = ((fragment, i) for fragment in fragments for i in range(len(fragment.blocks)))
    damages = [damage for name, record in there.items() if (damage := _check_header(found, name, record))]
    threads = ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1))  # hashing and reading leave Python's lock
    try:
        while batch := list(islice(blocks, BLOCKS_AT_ONCE)):
            for size, damage in threads.map(lambda block: _check(found, *block), batch):
                progress(size)
                if damage is not None:
                    damages.append(damage)
    finally:
        threads.shutdown(cancel_futures=True)
    return damages


def _check_header(found: Survey, name: str, record: FileRecord) -> Damage | None:
    try:
        with opened(found.path / name) as descriptor:
            check_header(found.path / name, descriptor, record, found.version or VERSION)
    except DamagedFile as error:
        return Damage(name, "", "header", 0, record.header_bytes, str(error))
    return None


def _check(found: Survey, fragment: Fragment, i: int) -> tuple[int, Damage | None]:
    """(bytes of the block, what is wrong with it)."""
    begin = i * fragment.block_bytes
    size = min(fragment.block_bytes, fragment.bytes - begin)
    path = found.path / fragment.file
    try:
        with opened(path) as descriptor:
            read_block(path, descriptor, fragment, i, memoryview(bytearray(size)), found.version or VERSION)
    except DamagedFile as error:
        return size, Damage(fragment.file, fragment.name, fragment.kind, fragment.offset + begin, size, str(error))
    return size, None
