"""Safetensors files read by place and written one tensor at a time.

The safetensors package maps files into memory, and what has been touched of a map counts as memory of the process: on
a model larger than the machine, converting would grow to its size. Here only the rows that are asked for are read, into
a buffer of a few megabytes.
"""

import json
import os
import struct
import weakref
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llm.boxes import Box
from llm.errors import DamagedFile

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
BUFFER_BYTES = 8 << 20
SHORT_BYTES = 4096
"""Parts of a row shorter than this cost less when whole rows are read."""
LONGEST_HEADER = 100 << 20


class Entry(NamedTuple):
    """A tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""


class Unread(NamedTuple):
    """A tensor of a dtype that is not read: whole numbers, 8 bits and fewer. Files may hold some that nobody needs."""

    dtype: str
    """As the file calls it."""
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class TensorFile:
    """Tensors that lie in a file row by row, by name. DamagedFile, naming the file, when it cannot be read."""

    def __init__(self, path: Path, entries: Mapping[str, Entry]) -> None:
        self.path = path
        self.entries = dict(entries)
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DamagedFile(f"{path}: {error.strerror or error}") from None
        self.close = weakref.finalize(self, os.close, self._descriptor)

    def read(self, key: str, box: Box, out: Tensor) -> None:
        """Copy a box of a tensor into `out`, of the box's shape and any dtype."""
        entry = self.entries[key]
        for part, where in _matrices(box):
            self._read_rows(entry, part, out[where] if where else out)

    def _read_rows(self, entry: Entry, box: Box, out: Tensor) -> None:
        """A box of one matrix, or of a vector or number."""
        shape, itemsize = (1,) * (2 - len(entry.shape)) + entry.shape, entry.dtype.itemsize
        *outer, (first, last), (low, high) = ((0, 1),) * (2 - len(box)) + box
        width, row = shape[-1], 0
        for n, (index, _) in zip(shape[:-2], outer, strict=True):
            row = row * n + index
        row = row * shape[-2] + first
        target = out if out.ndim == 2 else out.reshape(1, -1) if out.ndim == 0 else out.unsqueeze(0)
        short = (low, high) == (0, width) or (high - low) * itemsize < SHORT_BYTES
        if short and width * itemsize <= BUFFER_BYTES:  # whole rows, many at a time
            step = max(1, BUFFER_BYTES // max(1, width * itemsize))
            for i in range(0, last - first, step):
                n = min(step, last - first - i)
                values = self._values(entry.dtype, entry.offset + (row + i) * width * itemsize, n * width)
                target[i : i + n] = values.view(n, width)[:, low:high]
            return
        step = BUFFER_BYTES // itemsize
        for i in range(last - first):
            for at in range(low, high, step):
                n = min(step, high - at)
                start = entry.offset + ((row + i) * width + at) * itemsize
                target[i, at - low : at - low + n] = self._values(entry.dtype, start, n)

    def _values(self, dtype: torch.dtype, start: int, count: int) -> Tensor:
        buffer = bytearray(count * dtype.itemsize)
        done = 0
        while done < len(buffer):
            n = os.preadv(self._descriptor, [memoryview(buffer)[done:]], start + done)
            if n == 0:
                raise DamagedFile(f"{self.path}: cut off while it was read")
            done += n
        return torch.frombuffer(buffer, dtype=dtype)


class SafetensorsFile(TensorFile):
    """The tensors of one file; `unread` are those of other dtypes, which are only listed. DamagedFile, naming the file,
    when it is not what its header says."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, {})
        self.metadata, self.entries, self.unread = self._read_header()

    def _read_header(self) -> tuple[dict[str, str], dict[str, Entry], dict[str, Unread]]:
        size = os.fstat(self._descriptor).st_size
        first = os.pread(self._descriptor, 8, 0)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else LONGEST_HEADER + 1
        if length > min(LONGEST_HEADER, size - 8):
            raise DamagedFile(f"{self.path}: damaged or cut off: no safetensors header")
        try:
            header = json.loads(os.pread(self._descriptor, length, 8), object_pairs_hook=self._unique)
            metadata = header.pop("__metadata__", {})
            found = {key: self._entry(key, row, 8 + length) for key, row in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise DamagedFile(f"{self.path}: damaged: its safetensors header cannot be read") from None
        end = 8 + length
        for offset, size_of, key in sorted((entry.offset, _size(entry), key) for key, entry in found.items()):
            if offset != end:
                raise DamagedFile(f"{self.path}: damaged: {key} does not begin where the tensor before it ends")
            end += size_of
        if end != size:
            raise DamagedFile(f"{self.path}: damaged or cut off: it has {size:,} bytes, its header says {end:,}")
        entries = {key: entry for key, entry in found.items() if isinstance(entry, Entry)}
        return metadata, entries, {key: entry for key, entry in found.items() if isinstance(entry, Unread)}

    def _unique(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise DamagedFile(f"{self.path}: holds {first_repeated(pairs)} twice")
        return found

    def _entry(self, key: str, row: dict[str, Any], data: int) -> Entry | Unread:
        shape, (start, stop) = row["shape"], row["data_offsets"]
        if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
            raise ValueError
        if row["dtype"] not in DTYPES:
            return Unread(str(row["dtype"]), tuple(shape), data + start, stop - start)
        entry = Entry(DTYPES[row["dtype"]], tuple(shape), data + start)
        if _bytes(entry.shape, entry.dtype) != stop - start:
            raise DamagedFile(f"{self.path}: damaged: the bytes of {key} do not fit its shape")
        return entry


def first_repeated(pairs: list[tuple[str, Any]]) -> str:
    """The first key of a JSON object that has been there before."""
    seen: set[str] = set()
    return next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]


def _size(entry: Entry | Unread) -> int:
    return entry.nbytes if isinstance(entry, Unread) else _bytes(entry.shape, entry.dtype)


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _matrices(box: Box) -> Iterator[tuple[Box, tuple[int, ...]]]:
    """The box as boxes of one matrix each, and where each lies in it."""
    outer = box[:-2]
    for index in product(*(range(start, stop) for start, stop in outer)):
        where = tuple(i - start for i, (start, _) in zip(index, outer, strict=True))
        yield (*((i, i + 1) for i in index), *box[-2:]), where


def header_bytes(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """The beginning of a file with these tensors in this order; its length is a multiple of 8, so that values are
    aligned when the file is mapped."""
    rows: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for key, (dtype, shape) in tensors.items():
        size = _bytes(shape, dtype)
        rows[key] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(rows).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_tensors(
    path: Path,
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    values: Iterator[Tensor],
    metadata: dict[str, str],
) -> None:
    """Write a file whose tensors come one at a time, in the order of `tensors`."""
    with open(path, "wb", buffering=BUFFER_BYTES) as file:
        file.write(header_bytes(tensors, metadata))
        for (dtype, shape), tensor in zip(tensors.values(), values, strict=True):
            assert tuple(tensor.shape) == tuple(shape)
            flat = tensor.detach().to("cpu", dtype).contiguous().view(-1).view(torch.uint8)
            file.write(flat.numpy().data)
