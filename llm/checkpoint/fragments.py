"""One rank's file of a checkpoint: flat ranges of parameters and optimizer states, each with digests of its blocks.

A fragment is a flat range of a box of one tensor (the float32 master of a parameter, or one optimizer state of it),
exactly as tensor and expert parallelism and ZeRO left it on the rank that owns it: nothing is gathered to write it.
The file is a safetensors file, so it holds data and no code; which range of which parameter a tensor is, stands in the
checkpoint's manifest together with a digest per block, because safetensors itself loads a flipped bit in silence. The
file's header has a digest there too: no byte of a file is without one.

What is verified is read in whole blocks, so the order of values decides who can read little. A flat range of whole rows
is one run of a row-major file and has two ends, but the columns of a matrix lie in every block of it. A fragment of a
parameter that tensor parallelism cuts along another dimension than the first is therefore written in stripes of that
dimension, one after the other: what a tensor-parallel rank wants is then neighbouring stripes, and a flat range of rows
has two ends in each stripe.
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm.boxes import Box, box_shape
from llm.checkpoint.intersect import Part, rectangles, view
from llm.errors import DamagedFile
from llm.safetensors_file import header_bytes

BLOCK_BYTES = 8 << 20
"""Of values under one digest, at most: less is read in vain at each end of what is asked for."""
LEAST_BLOCK_BYTES, BLOCKS_OF_A_PARAMETER = 256 << 10, 16
"""A parameter has so many blocks, if that makes them neither smaller nor larger than it is said here."""
MOST_STRIPES = 24
"""Divided by 2, 3, 4, 6, 8 and 12: so many tensor-parallel ranks find their own columns in stripes of their own."""
LEAST_STRIPED_BYTES, LEAST_STRIPED_BLOCK_BYTES = 512 << 10, 256 << 10
"""Parameters smaller than this are read whole by everyone; digests of smaller blocks would weigh too much."""
VERSION = 3
BLANK = "0" * 32
"""A digest that is not known yet."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What a run saves is float32; weights that came from elsewhere may stay what they were."""
OwnedValues = tuple[str, str, Box, int, Tensor]
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
    block_bytes: int
    stripe: tuple[int, int] | None
    """(dimension, width): the order of values in the file is that of the stripes of the parameter between multiples of
    `width` in `dimension`, and inside a stripe as in the box; None: as in the box."""
    blocks: tuple[str, ...]

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "Fragment":
        """The fragment of a manifest row. TypeError or ValueError where it is none."""
        box = tuple((int(a), int(b)) for a, b in row["box"])
        numbers = {key: int(row[key]) for key in ("start", "numel", "offset", "block_bytes")}
        stripe = None if row["stripe"] is None else (int(row["stripe"][0]), int(row["stripe"][1]))
        return cls(**{**row, **numbers, "box": box, "stripe": stripe, "blocks": tuple(row["blocks"])})

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
        return -(-self.bytes // self.block_bytes)

    @property
    def part(self) -> Part:
        """Which elements of the parameter it holds."""
        return Part(self.box, self.start, self.start + self.numel)

    def ordered(self) -> list[Part]:
        """Its elements as parts of smaller boxes, in the order of values in the file; inside a part flat."""
        if not self.numel:
            return []
        return [self.part] if self.stripe is None else _striped(self.part, *self.stripe)

    def block_parts(self, ordered: list[Part]) -> Iterator[list[Part]]:
        """What each of its blocks holds, in order, out of `ordered`."""
        step, room = self.block_bytes // DTYPES[self.dtype].itemsize, 0
        block: list[Part] = []
        for box, start, stop in ordered:
            while start < stop:
                if room == 0 and block:
                    yield block
                    block = []
                room = room or step
                n = min(room, stop - start)
                block.append(Part(box, start, start + n))
                start, room = start + n, room - n
        if block:
            yield block


def digest(data: bytes | bytearray | memoryview, version: int = VERSION) -> str:
    """128 bits, hexadecimal: the first half of SHA-256, for which processors have instructions; in the older version 2
    of the format blake2b."""
    if version == 2:
        return hashlib.blake2b(data, digest_size=16).hexdigest()
    return hashlib.sha256(data).hexdigest()[:32]


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
class FileOutline:
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


def outline_file(
    name: str,
    owned: Iterable[OwnedValues],
    dtype: str = "float32",
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    cut: Mapping[str, int | None] | None = None,
) -> FileOutline:
    """The safetensors file `name` with these values in `dtype`, in their order.

    shapes, cut: of whole parameters, and the dimensions that tensor parallelism would cut; with them values are written
    in stripes where that lets ranks read less.
    """
    entries: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    rows: list[Fragment] = []
    width, at = DTYPES[dtype].itemsize, 0
    for parameter, kind, box, start, values in owned:
        n, stripe, block_bytes = values.numel(), None, BLOCK_BYTES
        if shapes is not None and parameter in shapes:
            stripe = _stripe(shapes[parameter], (cut or {}).get(parameter))
            block_bytes = _block_bytes(shapes[parameter], width, stripe)
        key = f"{parameter}|{kind}|{','.join(f'{a}:{b}' for a, b in box)}|{start}"  # nothing reads it
        if key in entries:  # what has no elements shares its place with others
            key = f"{key}|{len(rows)}"
        entries[key] = DTYPES[dtype], (n,)
        blank = (BLANK,) * -(-n * width // block_bytes)
        rows.append(Fragment(parameter, kind, box, start, n, dtype, name, at, block_bytes, stripe, blank))
        at += n * width
    header = header_bytes(entries)
    return FileOutline(name, header, tuple(replace(row, offset=len(header) + row.offset) for row in rows))


def _stripe(shape: tuple[int, ...], dimension: int | None) -> tuple[int, int] | None:
    """(dimension, width) of the stripes in which a parameter is written."""
    if not dimension or 4 * math.prod(shape) < LEAST_STRIPED_BYTES:
        return None
    return dimension, shape[dimension] // math.gcd(shape[dimension], MOST_STRIPES)


def _block_bytes(shape: tuple[int, ...], width: int, stripe: tuple[int, int] | None) -> int:
    """Of a block of a parameter whose values have `width` bytes. Ends in all stripes together cost no more than those
    of one range."""
    block = min(BLOCK_BYTES, max(LEAST_BLOCK_BYTES, math.prod(shape) * width // BLOCKS_OF_A_PARAMETER))
    if stripe is not None:
        stripes = shape[stripe[0]] // stripe[1]
        block = _whole_rows(max(min(block, LEAST_STRIPED_BLOCK_BYTES), block // stripes), shape, width, stripe)
    return max(width, block // width * width)


def _whole_rows(block: int, shape: tuple[int, ...], width: int, stripe: tuple[int, int]) -> int:
    """About so many bytes, but if possible as many as whole stripes, or equal parts of whole rows of one: each part of
    a block of a whole parameter is then one rectangle, and copied in one go."""
    dimension, columns = stripe
    rows = math.prod(shape[:dimension])
    size = rows * columns * math.prod(shape[dimension + 1 :]) * width
    if size <= block:
        return block // size * size
    most = -(-size // block)
    return next((size // n for n in range(most, 2 * most) if rows % n == 0), block)


def _striped(part: Part, dimension: int, width: int) -> list[Part]:
    """The part cut along a dimension at multiples of `width`, each as a flat range of its own smaller box."""
    box = part.box
    first, last = box[dimension]
    places = [first, *range((first // width + 1) * width, last, width), last]
    inner = math.prod(box_shape(box)[dimension + 1 :])
    found = []
    for low, high in pairwise(places):

        def before(position: int, low: int = low - first, high: int = high - first) -> int:
            """How many elements of the stripe come before one of the box."""
            outer, rest = divmod(position, (last - first) * inner)
            return outer * (high - low) * inner + min(max(rest - low * inner, 0), (high - low) * inner)

        stripe = Part((*box[:dimension], (low, high), *box[dimension + 1 :]), before(part.start), before(part.stop))
        if stripe.start < stripe.stop:
            found.append(stripe)
    return found


class GivenUp(Exception):
    """Writing was stopped from outside."""


def write_values(
    path: Path, outline: FileOutline, values: Iterable[Tensor], to_stop: Callable[[], bool] = lambda: False
) -> list[Fragment]:
    """Write the planned file and flush it to the disk; the fragments with their digests.

    values: flat, one tensor per fragment, in its order; they are taken one at a time. OSError naming the file when it
    cannot be written; GivenUp when `to_stop` came true meanwhile.
    """
    written = []
    try:
        with open(path, "wb", buffering=BLOCK_BYTES) as file:  # small fragments go to the disk together
            file.write(outline.header)
            for fragment, tensor in zip(outline.fragments, values, strict=True):
                held = tensor.detach().to("cpu", DTYPES[fragment.dtype]).contiguous()
                flat = held.as_strided((held.numel(),), (1,))  # one element may have any stride, which `view` minds
                blocks = []
                for parts in fragment.block_parts(fragment.ordered()):
                    if to_stop():
                        raise GivenUp
                    block = bytes_of(_taken(flat, fragment.part, parts))
                    blocks.append(digest(block))  # this and the writing leave Python to other threads
                    file.write(block)
                written.append(replace(fragment, blocks=tuple(blocks)))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(f"{path}: {error.strerror or error}") from None
    return written


def _taken(flat: Tensor, of: Part, parts: list[Part]) -> Tensor:
    """The values of some parts of a fragment, one after the other; its own are `flat`. A view where they lie together.
    """
    if len(parts) == 1 and parts[0].box == of.box:
        return flat[parts[0].start - of.start : parts[0].stop - of.start]
    sizes = [part.stop - part.start for part in parts]
    values = torch.empty(sum(sizes), dtype=flat.dtype)
    for part, place in zip(parts, values.split(sizes), strict=True):
        for rectangle in rectangles(part):
            view(place, part, rectangle).copy_(view(flat, of, rectangle))
    return values


def bytes_of(flat: Tensor) -> memoryview:
    """The memory of flat values on the CPU."""
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")


def check_header(path: Path, descriptor: int, record: FileRecord, version: int) -> None:
    """DamagedFile naming the file where its header is not the one that was written."""
    header = memoryview(bytearray(record.header_bytes))
    if not _fill(path, descriptor, header, 0) or digest(header, version) != record.header:
        raise DamagedFile(f"{path}: damaged: its header does not match its digest")


def read_block(
    path: Path, descriptor: int, fragment: Fragment, i: int, block: memoryview, version: int
) -> None:
    """Read block number `i` of a fragment into memory of its length and verify it there.

    DamagedFile naming the file when that is too short or the block differs from its digest: what `block` then holds is
    of no use.
    """
    whole = _fill(path, descriptor, block, fragment.offset + i * fragment.block_bytes)
    if not whole or digest(block, version) != fragment.blocks[i]:
        raise DamagedFile(f"{path}: damaged: {fragment.name} ({fragment.kind}) does not match its digest")


def _fill(path: Path, descriptor: int, block: memoryview, offset: int) -> bool:
    """Read from `offset` on until the block is full; False where the file ends before."""
    done = 0
    try:
        while done < len(block):
            size = os.preadv(descriptor, [block[done:]], offset + done)
            if not size:
                return False
            done += size
    except OSError as error:
        raise DamagedFile(f"{path}: {error.strerror or error}") from None
    return True


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor to read from. DamagedFile naming the file where it cannot be opened."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise DamagedFile(f"{path}: {error.strerror or error}") from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)
