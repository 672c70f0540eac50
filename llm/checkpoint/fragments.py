"""One rank's file of a checkpoint: flat pieces of parameters and optimizer states, each with digests of its blocks.

A fragment is a flat range of a box of one tensor (the float32 master of a parameter, or one optimizer state of it),
exactly as tensor and expert parallelism and ZeRO left it on the rank that owns it: nothing is gathered to write it.
The file is a safetensors file, so it holds data and no code; which range of which parameter a tensor is, stands in the
checkpoint's manifest together with a digest per 16 MiB block, because safetensors itself loads a flipped bit in
silence.
"""

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from llm.boxes import Box
from llm.checkpoint.overlap import Part
from llm.errors import DamagedFile

BLOCK_BYTES = 16 << 20
DTYPES = {"float32": torch.float32}
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
        """The fragment of a manifest row."""
        box = tuple((int(a), int(b)) for a, b in row["box"])
        return cls(**{**row, "box": box, "blocks": tuple(row["blocks"])})

    def to_json(self) -> dict[str, Any]:
        """The manifest row of this fragment."""
        return asdict(self)

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


def write_fragments(path: Path, pieces: Iterable[Piece]) -> list[Fragment]:
    """Write pieces as float32 to a new file, flushed to the disk; return their records."""
    rows = [
        (_key(name, kind, box, start), name, kind, box, start, values.detach().to("cpu", torch.float32).contiguous())
        for name, kind, box, start, values in pieces
    ]
    try:
        save_file({key: values for key, *_, values in rows}, path)
    except SafetensorError as error:  # a full disk is one of these, and no OSError
        raise OSError(f"{path}: {error}") from None
    path.chmod(0o644)  # safetensors makes it readable by its owner only
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_bytes))
    fragments = []
    for key, name, kind, box, start, values in rows:
        data = memoryview(values.numpy().data).cast("B") if values.numel() else memoryview(b"")
        blocks = tuple(digest(data[i : i + BLOCK_BYTES]) for i in range(0, len(data), BLOCK_BYTES))
        offset = 8 + header_bytes + header[key]["data_offsets"][0]
        fragments.append(Fragment(name, kind, box, start, values.numel(), "float32", path.name, offset, blocks))
    return fragments


def _key(name: str, kind: str, box: Box, start: int) -> str:
    """The name of a piece inside its file; nothing reads it."""
    return f"{name}|{kind}|{','.join(f'{a}:{b}' for a, b in box)}|{start}"


def read_blocks(folder: Path, fragment: Fragment, indices: Iterable[int]) -> Iterator[tuple[int, Tensor]]:
    """(i, flat values) of the blocks of a fragment that `indices` names, each verified before it is given out.

    Raises DamagedFile naming the file when it is missing, too short or a block differs from its digest.
    """
    dtype = DTYPES[fragment.dtype]
    total = fragment.numel * dtype.itemsize
    path = folder / fragment.file
    try:
        with open(path, "rb") as file:
            for i in indices:
                block = bytearray(min(BLOCK_BYTES, total - i * BLOCK_BYTES))
                file.seek(fragment.offset + i * BLOCK_BYTES)
                if file.readinto(block) != len(block) or digest(block) != fragment.blocks[i]:
                    raise DamagedFile(f"{path}: damaged: {fragment.name} ({fragment.kind}) does not match its digest")
                yield i, torch.frombuffer(block, dtype=dtype)
    except OSError as error:
        raise DamagedFile(f"{path}: {error.strerror or error}") from None
