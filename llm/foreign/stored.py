"""Files of foreign tensors: safetensors, and what torch.save writes. Read as they are asked for.

Pickles are opened by torch with weights_only, which executes nothing; one that asks for code is refused. A tensor of a
dtype that is not read is listed all the same: checkpoints hold buffers that no model needs, of any dtype.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from llm.boxes import whole
from llm.checkpoint.weights import boxed
from llm.errors import DamagedFile, UserError
from llm.foreign.family import Computed
from llm.foreign.transforms import BoxPair, Shape
from llm.safetensors_file import DTYPES, Entry, SafetensorsFile, TensorFile, Unread


class Stored(Protocol):
    """The tensors of one file."""

    path: Path

    def shapes(self) -> Mapping[str, Shape]:
        """Of all tensors, those that cannot be read too."""

    def dtype(self, key: str) -> torch.dtype | None:
        """None of a tensor that cannot be read."""

    def described(self, key: str) -> tuple[str, int]:
        """Name of the dtype, and bytes."""

    def read(self, pair: BoxPair, out: Tensor) -> None:
        """Copy the values of pair.theirs into `out`, which has the shape of pair.mine."""


class StoredSafetensors:
    """A safetensors file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = SafetensorsFile(path)
        self._all: dict[str, Entry | Unread] = {**self._file.entries, **self._file.unread}
        self._shapes = {key: entry.shape for key, entry in self._all.items()}
        self.metadata: Mapping[str, str] = self._file.metadata

    def shapes(self) -> dict[str, Shape]:
        return self._shapes

    def dtype(self, key: str) -> torch.dtype | None:
        entry = self._file.entries.get(key)
        return None if entry is None else entry.dtype

    def described(self, key: str) -> tuple[str, int]:
        entry = self._all[key]
        if isinstance(entry, Unread):
            return entry.dtype, entry.nbytes
        return _name(entry.dtype), torch.Size(entry.shape).numel() * entry.dtype.itemsize

    def read(self, pair: BoxPair, out: Tensor) -> None:
        self._file.read(pair.key, pair.theirs, pair.to_theirs(out))


class StoredComputed:
    """A tensor that is computed, whole, from one of a file whenever it is read: for small ones."""

    def __init__(self, file: Stored, computed: Computed) -> None:
        self.path = file.path
        self._file = file
        self._computed = computed

    def shapes(self) -> dict[str, Shape]:
        return {self._computed.name: self._file.shapes()[self._computed.source]}

    def dtype(self, key: str) -> torch.dtype | None:
        return self._file.dtype(self._computed.source)

    def described(self, key: str) -> tuple[str, int]:
        return self._file.described(self._computed.source)

    def read(self, pair: BoxPair, out: Tensor) -> None:
        source, shape = self._computed.source, self._file.shapes()[self._computed.source]
        all_of_it = torch.empty(shape)
        self._file.read(BoxPair(source, pair.shard, whole(shape), pair.name, whole(shape)), all_of_it)
        out.copy_(pair.to_mine(boxed(self._computed.compute(all_of_it), pair.theirs)))


class StoredPickle:
    """A zip file of torch.save. torch says where in it the values lie; they are read there, not from torch's map of the
    file, because what has been touched of a map counts as memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        found = self._open()
        self._others = {key: _other(value) for key, value in found.items() if not _readable(value)}
        self._tensors: dict[str, Tensor] = {key: value for key, value in found.items() if key not in self._others}
        self._shapes = {key: tuple(value.shape) if isinstance(value, Tensor) else () for key, value in found.items()}
        maps = _maps_of(path)
        self._file = TensorFile(path, {key: e for key, tensor in self._tensors.items() if (e := _entry(tensor, maps))})

    def _open(self) -> dict[str, Any]:
        try:
            found = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError:
            raise UserError(
                f"{self.path}: refused: it holds more than tensors, which loading it might execute as code"
            ) from None
        except (RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
            if _is_legacy(self.path):
                raise UserError(
                    f"{self.path}: in the format before torch 1.6, which is not read; save it again with a newer torch"
                ) from None
            raise DamagedFile(f"{self.path}: damaged or cut off: {_first_line(error)}") from None
        except OSError as error:
            raise DamagedFile(f"{self.path}: {error.strerror or error}") from None
        found = found.get("model", found) if isinstance(found, dict) else found
        tensors = found.values() if isinstance(found, dict) else ()
        if not any(isinstance(value, Tensor) for value in tensors) or not all(isinstance(key, str) for key in found):
            raise UserError(f"{self.path}: holds no mapping of names to tensors")
        return dict(found)

    def shapes(self) -> dict[str, Shape]:
        return self._shapes

    def dtype(self, key: str) -> torch.dtype | None:
        return None if key in self._others else self._tensors[key].dtype

    def described(self, key: str) -> tuple[str, int]:
        if key in self._others:
            return self._others[key]
        return _name(self._tensors[key].dtype), self._tensors[key].nbytes

    def read(self, pair: BoxPair, out: Tensor) -> None:
        target = pair.to_theirs(out)
        if pair.key in self._file.entries:
            self._file.read(pair.key, pair.theirs, target)
        else:
            target.copy_(boxed(self._tensors[pair.key], pair.theirs))


def _readable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in DTYPES.values() and value.layout == torch.strided


def _other(value: Any) -> tuple[str, int]:
    """What a value that is not read is, and its bytes, as far as they are known."""
    if not isinstance(value, Tensor):
        return type(value).__name__, 0
    sparse = "" if value.layout == torch.strided else ", sparse"
    return _name(value.dtype) + sparse, value.numel() * value.dtype.itemsize


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _maps_of(path: Path) -> list[tuple[int, int, int]]:
    """(first address, address behind the last, place in the file) of maps of a file; none where Linux is not."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        addresses, _, place, _, _, *name = line.split(maxsplit=5)
        if name == [str(path.resolve())]:
            first, last = (int(address, 16) for address in addresses.split("-"))
            found.append((first, last, int(place, 16)))
    return found


def _entry(tensor: Tensor, maps: list[tuple[int, int, int]]) -> Entry | None:
    """Where in its mapped file a tensor lies; None for one that is not mapped, or not row by row."""
    at = tensor.data_ptr()
    for first, last, place in maps:
        if tensor.is_contiguous() and first <= at and at + tensor.nbytes <= last:
            return Entry(tensor.dtype, tuple(tensor.shape), at - first + place)
    return None


def _is_legacy(path: Path) -> bool:
    """Whether it begins like a pickle, not like a zip file."""
    with open(path, "rb") as file:
        return file.read(1) == b"\x80"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
