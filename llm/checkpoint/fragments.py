"""One rank's file of a checkpoint: flat pieces of parameters and optimizer states, each with digests of its blocks.

A fragment is a flat range of a box of one tensor (the float32 master of a parameter, or one optimizer state of it),
exactly as tensor and expert parallelism and ZeRO left it on the rank that owns it: nothing is gathered to write it.
The file is a safetensors file, so it holds data and no code; which range of which parameter a tensor is, stands in the
checkpoint's manifest together with a digest per 16 MiB block, because safetensors itself loads a flipped bit in
silence. The file's header has a digest there too: no byte of a file is without one.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm.boxes import Box
from llm.checkpoint.overlap import Part
from llm.errors import DamagedFile
from llm.safetensors_file import header_bytes

BLOCK_BYTES = 16 << 20
BLANK = "0" * 32
"""A digest that is not known yet."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What a run saves is float32; weights that came from elsewhere may stay what they were."""
Piece = tuple[str, str, Box, int, Tensor]
"""(name, kind, box, start, values): flat values of the elements [start, start + len(values)) of the flattened box."""


@dataclass(frozen=True)
class Fragment:
    """Values [start, start + numel) of the flattened `box` of parameter `name`.

    `box` is a (start, stop) pair per dimension: the part of the whole parameter that tensor or expert parallelism
    left on the rank. `kind` is "master" or the key of an optimizer state. `offset` counts bytes from the start of the
    file.
    """

    name: str
    kind: str
    box: Box
    start: int
    numel: int
    dtype: str
    file: str
    offset: int
    blocks: tuple[str, ...]

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "Fragment":
        """The fragment of a manifest row. TypeError or ValueError where it is none."""
        box = tuple((int(a), int(b)) for a, b in row["box"])
        numbers = {key: int(row[key]) for key in ("start", "numel", "offset")}
        return cls(**{**row, **numbers, "box": box, "blocks": tuple(row["blocks"])})

    def to_json(self) -> dict[str, Any]:
        """The manifest row of this fragment."""
        return dict(self.__dict__)  # asdict would copy each box and digest, of thousands of fragments, while all wait

    @property
    def bytes(self) -> int:
        """Of its values."""
        return self.numel * DTYPES[self.dtype].itemsize

    @property
    def n_blocks(self) -> int:
        """Blocks that so many bytes make."""
        return _n_blocks(self.bytes)

    @property
    def part(self) -> Part:
        """Which elements of the parameter it holds."""
        return Part(self.box, self.start, self.start + self.numel)

    def block_parts(self) -> list[Part]:
        """Which elements each of its blocks holds."""
        step = BLOCK_BYTES // DTYPES[self.dtype].itemsize
        stop = self.start + self.numel
        return [Part(self.box, first, min(first + step, stop)) for first in range(self.start, stop, step)]


def digest(data: bytes | bytearray | memoryview) -> str:
    """blake2b-128 of a block, hexadecimal."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


@dataclass(frozen=True)
class FileRecord:
    """What the manifest says of a file: its length, and length and digest of the header that its values follow."""

    bytes: int
    header_bytes: int
    header: str

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> "FileRecord":
        """The record of a manifest entry. TypeError or ValueError where it is none."""
        return cls(**{**entry, "bytes": int(entry["bytes"]), "header_bytes": int(entry["header_bytes"])})

    def to_json(self) -> dict[str, Any]:
        """The manifest entry of this record."""
        return asdict(self)


@dataclass(frozen=True)
class FilePlan:
    """What a rank's file will be, known before a byte of it is written."""

    name: str
    header: bytes
    fragments: tuple[Fragment, ...]
    """In the order of their values in the file, with the right number of digests, all of them blank."""

    @property
    def bytes(self) -> int:
        """Length of the file."""
        return len(self.header) + sum(fragment.bytes for fragment in self.fragments)

    @property
    def record(self) -> FileRecord:
        """What the manifest will say of it."""
        return FileRecord(self.bytes, len(self.header), digest(self.header))


def plan_file(name: str, pieces: Iterable[Piece], dtype: str = "float32") -> FilePlan:
    """The safetensors file `name` with these pieces in `dtype`, in their order."""
    entries: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    rows: list[tuple[str, str, Box, int, int, int]] = []
    at = 0
    for parameter, kind, box, start, values in pieces:
        size = DTYPES[dtype].itemsize * values.numel()
        key = f"{parameter}|{kind}|{','.join(f'{a}:{b}' for a, b in box)}|{start}"  # nothing reads it
        if key in entries:  # pieces without values share their place with others
            key = f"{key}|{len(rows)}"
        entries[key] = DTYPES[dtype], (values.numel(),)
        rows.append((parameter, kind, box, start, values.numel(), at))
        at += size
    header, width = header_bytes(entries), DTYPES[dtype].itemsize
    fragments = tuple(
        Fragment(parameter, kind, box, start, n, dtype, name, len(header) + offset, (BLANK,) * _n_blocks(width * n))
        for parameter, kind, box, start, n, offset in rows
    )
    return FilePlan(name, header, fragments)


def _n_blocks(size: int) -> int:
    return -(-size // BLOCK_BYTES)


class GivenUp(Exception):
    """Writing was stopped from outside."""


def write_planned(
    path: Path, plan: FilePlan, values: Iterable[Tensor], to_stop: Callable[[], bool] = lambda: False
) -> list[Fragment]:
    """Write the planned file and flush it to the disk; the fragments with their digests.

    values: flat, one tensor per fragment, in its order; they are taken one at a time. OSError naming the file when it
    cannot be written; GivenUp when `to_stop` came true meanwhile.
    """
    fragments = []
    try:
        with open(path, "wb", buffering=BLOCK_BYTES) as file:  # small pieces go to the disk together
            file.write(plan.header)
            for fragment, tensor in zip(plan.fragments, values, strict=True):
                held = tensor.detach().to("cpu", DTYPES[fragment.dtype]).contiguous()
                flat = held.as_strided((held.numel(),), (1,))  # one element may have any stride, which `view` minds
                data = memoryview(flat.view(torch.uint8).numpy().data) if held.numel() else memoryview(b"")
                blocks = []
                for i in range(0, len(data), BLOCK_BYTES):
                    if to_stop():
                        raise GivenUp
                    block = data[i : i + BLOCK_BYTES]
                    blocks.append(digest(block))  # this and the writing leave Python to other threads
                    file.write(block)
                fragments.append(replace(fragment, blocks=tuple(blocks)))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(f"{path}: {error.strerror or error}") from None
    return fragments


def _fill(file: FileIO, block: bytearray, offset: int) -> bool:
    """Read from `offset` on until the block is full; False where the file ends before."""
    file.seek(offset)
    rest = memoryview(block)
    while rest:
        size = file.readinto(rest)
        if not size:
            return False
        rest = rest[size:]
    return True


def check_header(folder: Path, name: str, record: FileRecord) -> None:
    """DamagedFile naming the file where its header is not the one that was written."""
    path, header = folder / name, bytearray(record.header_bytes)
    try:
        with open(path, "rb", buffering=0) as file:
            whole = _fill(file, header, 0)
    except OSError as error:
        raise DamagedFile(f"{path}: {error.strerror or error}") from None
    if not whole or digest(header) != record.header:
        raise DamagedFile(f"{path}: damaged: its header does not match its digest")


def read_blocks(folder: Path, fragment: Fragment, indices: Iterable[int]) -> Iterator[tuple[int, Tensor]]:
    """(i, flat values) of the blocks of a fragment that `indices` names, each verified before it is given out.

    Raises DamagedFile naming the file when it is missing, too short or a block differs from its digest.
    """
    dtype, total = DTYPES[fragment.dtype], fragment.bytes
    path = folder / fragment.file
    try:
        with open(path, "rb", buffering=0) as file:  # a buffer would read beyond the block
            for i in indices:
                block = bytearray(min(BLOCK_BYTES, total - i * BLOCK_BYTES))
                whole = _fill(file, block, fragment.offset + i * BLOCK_BYTES)
                if not whole or digest(block) != fragment.blocks[i]:
                    raise DamagedFile(f"{path}: damaged: {fragment.name} ({fragment.kind}) does not match its digest")
                yield i, torch.frombuffer(block, dtype=dtype)
    except OSError as error:
        raise DamagedFile(f"{path}: {error.strerror or error}") from None
