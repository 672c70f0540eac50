"""Foreign model folders: what they are, and their tensors, read as they are asked for.

Hugging Face: config.json beside model.safetensors, or its parts and their index, or the same as .bin files. Meta:
params.json beside consolidated.NN.pth. Pickles are opened by torch with weights_only, which executes nothing; one that
asks for code is refused.
"""

import json
import pickle
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import ValidationError
from torch import Tensor

from llm.args import ModelArgs
from llm.errors import DamagedFile, UserError
from llm.foreign.family import Family, Match, family_named, match
from llm.foreign.load import ForeignWeights, view
from llm.foreign.pieces import Piece, Shape
from llm.parallel.build import whole_shapes
from llm.safetensors_file import DTYPES, Entry, SafetensorsFile, TensorFile, first_repeated

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "generation_config.json", "chat_template.jinja",
)  # fmt: skip
LLAMA4_KEYS = {"moe_args", "use_qk_norm", "nope_layer_interval", "attention_chunk_size", "attn_temperature_tuning"}
"""Of Meta's params.json, which does not name its family; they matter to no earlier one."""
Key = tuple[int, str]


class _File(Protocol):
    def shapes(self) -> Mapping[str, Shape]: ...

    def dtype(self, key: str) -> torch.dtype: ...

    def read(self, piece: Piece, out: Tensor) -> None: ...


class _Safetensors:
    def __init__(self, path: Path) -> None:
        self._file = SafetensorsFile(path)
        self._shapes = {key: entry.shape for key, entry in self._file.entries.items()}

    def shapes(self) -> dict[str, Shape]:
        return self._shapes

    def dtype(self, key: str) -> torch.dtype:
        return self._file.entries[key].dtype

    def read(self, piece: Piece, out: Tensor) -> None:
        self._file.read(piece.key, piece.theirs, piece.to_theirs(out))


class _Pickle:
    """A zip file of torch.save. torch says where in it the values lie; they are read there, not from torch's map of the
    file, because what has been touched of a map counts as memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tensors = self._open()
        self._shapes = {key: tuple(tensor.shape) for key, tensor in self._tensors.items()}
        maps = _maps_of(path)
        self._file = TensorFile(path, {key: e for key, tensor in self._tensors.items() if (e := _entry(tensor, maps))})

    def _open(self) -> dict[str, Tensor]:
        try:
            found = torch.load(self._path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError:
            raise UserError(
                f"{self._path}: refused: it holds more than tensors, which loading it might execute as code"
            ) from None
        except (RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
            if _is_legacy(self._path):
                raise UserError(
                    f"{self._path}: in the format before torch 1.6, which is not read; save it again with a newer torch"
                ) from None
            raise DamagedFile(f"{self._path}: damaged or cut off: {_first_line(error)}") from None
        except OSError as error:
            raise DamagedFile(f"{self._path}: {error.strerror or error}") from None
        found = found.get("model", found) if isinstance(found, dict) else found
        if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
            raise UserError(f"{self._path}: holds no mapping of names to tensors")
        for key, tensor in found.items():
            if tensor.dtype not in DTYPES.values() or tensor.layout != torch.strided:
                kind = str(tensor.dtype).removeprefix("torch.") + ("" if tensor.layout == torch.strided else ", sparse")
                raise UserError(f"{self._path}: {key} is {kind}; known are {', '.join(DTYPES)}")
        return found

    def shapes(self) -> dict[str, Shape]:
        return self._shapes

    def dtype(self, key: str) -> torch.dtype:
        return self._tensors[key].dtype

    def read(self, piece: Piece, out: Tensor) -> None:
        target = piece.to_theirs(out)
        if piece.key in self._file.entries:
            self._file.read(piece.key, piece.theirs, target)
        else:
            target.copy_(view(self._tensors[piece.key], piece.theirs))


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


class Files:
    """The tensors of one or several files, by (shard, key)."""

    def __init__(self, name: str, files: Mapping[Key, _File]) -> None:
        self.name = name
        self._files = files

    def shapes(self) -> dict[Key, Shape]:
        return {(shard, key): file.shapes()[key] for (shard, key), file in self._files.items()}

    def dtypes(self) -> Counter[torch.dtype]:
        """How many tensors are of each dtype."""
        return Counter(file.dtype(key) for (_, key), file in self._files.items())

    def dtype(self) -> torch.dtype:
        """The dtype of most tensors."""
        return self.dtypes().most_common(1)[0][0]

    def read(self, piece: Piece, out: Tensor) -> None:
        self._files[piece.shard, piece.key].read(piece, out)


@dataclass(frozen=True)
class ForeignModel:
    """A foreign folder, understood: its tensors are there and known, none of their values has been read."""

    path: Path
    family: Family
    args: ModelArgs
    config: dict[str, Any]
    found: Match
    files: Files
    warnings: tuple[str, ...] = field(default=())

    def weights(self) -> ForeignWeights:
        return ForeignWeights(self.files, self.found)


def is_foreign(path: Path) -> bool:
    """Whether a folder looks like one of another system."""
    return (path / "config.json").is_file() or (path / "params.json").is_file()


def open_foreign(path: Path, family: str | None = None, overrides: Mapping[str, Any] | None = None) -> ForeignModel:
    """The model in a folder; `overrides` are keys of ModelArgs that hold instead of what its config says.

    UserError, naming file and key, when it is of no known family, or config and tensors do not fit together.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder")
    warnings: list[str] = []
    if (path / "config.json").is_file():
        config = _read_json(path / "config.json")
        chosen = family_named(family) if family else _family_of(config, path)
        shards = [_hf_files(path)]
    elif (path / "params.json").is_file():
        config = _read_json(path / "params.json")
        shards = [{key: file for key in file.shapes()} for file in _meta_files(path)]
        fused = any(key.endswith(("wqkv.weight", "router_DE")) for key in shards[0])
        chosen = family_named(family or ("meta_llama4" if fused or config.keys() & LLAMA4_KEYS else "meta_llama"))
    else:
        raise UserError(f"{path}: holds neither config.json nor params.json")
    files = Files(str(path), {(i, key): file for i, shard in enumerate(shards) for key, file in shard.items()})
    shapes = files.shapes()
    try:
        read = chosen.read_config(config, warnings.append)
        if chosen.format == "meta":
            read |= _settled_by_weights(read, shapes, len(shards))
    except UserError as error:  # it says in which file, not where that is
        named = "params.json" if chosen.format == "meta" else "config.json"
        raise UserError(str(error).replace("config.json", str(path / named), 1)) from None
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError) as error:
        raise UserError(f"{path}: its config makes no sense to {chosen.name}: {type(error).__name__} {error}") from None
    args = _model_args(path, {**read, **_merged(read, overrides or {})})
    found = match(chosen, args, whole_shapes(args), shapes, len(shards))
    found.check(str(path))
    return ForeignModel(path, chosen, args, config, found, files, tuple(warnings))


def _merged(read: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Groups are overridden key by key."""
    return {
        key: {**read[key], **value} if isinstance(value, dict) and isinstance(read.get(key), dict) else value
        for key, value in overrides.items()
    }


def _model_args(path: Path, raw: dict[str, Any]) -> ModelArgs:
    try:
        return ModelArgs.model_validate(raw)
    except ValueError as error:
        problems = error.errors() if isinstance(error, ValidationError) else []
        said = "; ".join(f"{'.'.join(map(str, p['loc']))} {p['msg']}".strip() for p in problems) or str(error)
        raise UserError(f"{path}: its config makes no model: {said}") from None


def _read_json(path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise UserError(f"{path}: holds {first_repeated(pairs)} twice")
        return dict(pairs)

    try:
        found = json.loads(path.read_bytes(), object_pairs_hook=unique)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: damaged: not JSON") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: damaged: not a JSON object")
    return found


def _family_of(config: Mapping[str, Any], path: Path) -> Family:
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise UserError(f"{path / 'config.json'}: model_type is missing; give --family")
    try:
        return family_named(kind)
    except UserError as error:
        raise UserError(f"{path / 'config.json'}: model_type: {error}") from None


def _hf_files(path: Path) -> dict[str, _File]:
    for stem, suffix, kind in (("model", "safetensors", _Safetensors), ("pytorch_model", "bin", _Pickle)):
        index = path / f"{stem}.{suffix}.index.json"
        if index.is_file():
            return _indexed(path, index, kind)
        if (single := path / f"{stem}.{suffix}").is_file():
            file = kind(single)
            return {key: file for key in file.shapes()}
    raise UserError(f"{path}: holds no model.safetensors, model.safetensors.index.json or pytorch_model.bin")


def _indexed(path: Path, index: Path, kind: type[_Safetensors] | type[_Pickle]) -> dict[str, _File]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index}: damaged: it has no weight_map")
    files: dict[str, _File] = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise UserError(f"{index}: names a file outside its folder: {name}")
        if not (path / name).is_file():
            raise UserError(f"{path / name}: missing, {index.name} lists it")
        files[name] = kind(path / name)
    found: dict[str, _File] = {}
    for name, file in files.items():
        for key in file.shapes():
            if key in found:
                raise UserError(f"{path / name}: holds {key}, which another part holds too")
            found[key] = file
    for key, name in weight_map.items():
        if key not in files[name].shapes():
            raise UserError(f"{path / name}: has no {key}, {index.name} says so")
    return found


def _meta_files(path: Path) -> list[_File]:
    numbers = {int(m[1]): p for p in path.iterdir() if (m := re.fullmatch(r"consolidated\.(\d\d)\.pth", p.name))}
    if not numbers:
        raise UserError(f"{path}: holds no consolidated.00.pth")
    for number in range(max(numbers) + 1):
        if number not in numbers:
            raise UserError(f"{path / f'consolidated.{number:02d}.pth'}: missing")
    return [_Pickle(numbers[number]) for number in sorted(numbers)]


def _settled_by_weights(read: Mapping[str, Any], shapes: Mapping[Key, Shape], shards: int) -> dict[str, Any]:
    """What Meta's params.json leaves to the weights: vocabulary, tied heads, number of experts."""
    found: dict[str, Any] = {}
    table = shapes.get((0, "tok_embeddings.weight"))
    if table is not None and len(table) == 2 and read.get("vocab_size", -1) == -1:
        found["vocab_size"] = table[0] * (shards if table[1] == read["dim"] else 1)
    if (0, "output.weight") not in shapes:
        found["tie_embeddings"] = True
    moe = read.get("moe")
    if moe is not None and moe["n_experts"] < 1:
        routers = [shape for (_, key), shape in shapes.items() if key.endswith("router_DE")]
        if routers:
            found["moe"] = {**moe, "n_experts": routers[0][-1]}
    return found
