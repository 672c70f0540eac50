"""Which files of a foreign folder hold its weights.

Many folders hold several sets: a merge saved over an older one, .bin beside .safetensors, Meta's own files beside those
of Hugging Face. Where transformers has a rule, its choice is taken and said; where it depends on what else is
installed, the folder is refused.
"""

import json
import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llm.boxes import box_shape, whole
from llm.errors import UserError
from llm.foreign.stored import Stored, StoredPickle, StoredSafetensors
from llm.foreign.transforms import BoxPair
from llm.safetensors_file import first_repeated

SETS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""In the order in which transformers looks for them."""
OTHER_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "consolidated.*.pth", "*.index.json")
FOREIGN_FORMS = ("*.gguf", "tf_model.h5", "flax_model.msgpack", "*.ckpt.index", "*.onnx", "*.npz")
"""What may hold a model too, and is read by nobody here."""
SHOWN = 3


@dataclass
class WeightFiles:
    """Tensors of a folder by name, a mapping for each tensor-parallel rank that wrote it, and what is to be said."""

    shards: list[dict[str, Stored]]
    parts: list[str]
    """Names of the files that are read."""
    notes: list[str] = field(default_factory=list)
    lost: dict[str, str] = field(default_factory=dict)
    """Names that the index gives to a file, which does not have them -> what to say where they are needed."""
    unlisted: dict[str, str] = field(default_factory=dict)
    """Names in a file that the index does not have -> the file."""

    def spare(self, used: Set[str], unknown: Iterable[str]) -> tuple[list[str], set[str]]:
        """Lines about names in which index and parts differ, and those of `unknown` that are nobody's.

        used: tensors that the model needs, be they there or not. UserError where the index is wrong about one of them.
        """
        for key, said in self.lost.items():
            if key in used:
                raise UserError(said)
        nobodys = {key for key in unknown if key in self.unlisted}
        taken = [key for key in self.unlisted if key in used]
        notes = []
        if self.lost:
            notes.append(f"the index names {_some(list(self.lost))}, which no part holds and the model does not need")
        if nobodys:
            notes.append(f"{_some(sorted(nobodys))} is in a part but not in the index, and nothing needs it: not read")
        if taken:
            notes.append(f"{_some(taken)} is in a part but not in the index, and read, as by transformers")
        return notes, nobodys


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. UserError, naming the file, where it is none, or has a key twice."""

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


def hugging_face_files(path: Path, config: Mapping[str, Any]) -> WeightFiles:
    """The weights beside a config.json. UserError naming what is there instead."""
    named = config.get("transformers_weights")
    if named is not None:
        of_folder = isinstance(named, str) and Path(named).name == named
        if not of_folder or not named.endswith((".safetensors", ".safetensors.index.json")):
            raise UserError(f"{path / 'config.json'}: transformers_weights={named} names no safetensors file of it")
        if not (path / named).is_file():
            raise UserError(f"{path / named}: missing, config.json names it as transformers_weights")
    chosen = named or next((name for name in SETS if (path / name).is_file()), None)
    if chosen is None:
        raise UserError(f"{path}: holds no {SETS[0]}, {SETS[1]} or {SETS[2]}{_instead(path)}")
    if (path / "adapter_config.json").is_file():
        raise UserError(
            f"{path}: holds adapter_config.json beside {chosen}: transformers adds the adapter or not, as peft is "
            f"installed or not; move adapter_config.json out to read {chosen} alone, or merge the adapter first"
        )
    found = _indexed(path / chosen) if chosen.endswith(".json") else _single(path / chosen)
    if others := _others(path, {chosen, *found.parts}):
        found.notes.append(f"holds {_some(others)} beside {chosen}, which is read, as by transformers")
    return found


def meta_files(path: Path) -> WeightFiles:
    """The weights beside a params.json."""
    numbers = {int(m[1]): p for p in path.iterdir() if (m := re.fullmatch(r"consolidated\.(\d\d)\.pth", p.name))}
    if not numbers:
        raise UserError(f"{path}: holds no consolidated.00.pth{_instead(path)}")
    for number in range(max(numbers) + 1):
        if number not in numbers:
            raise UserError(f"{path / f'consolidated.{number:02d}.pth'}: missing")
    files = [StoredPickle(numbers[number]) for number in sorted(numbers)]
    found = WeightFiles([dict.fromkeys(file.shapes(), file) for file in files], [file.path.name for file in files])
    if others := _others(path, set(found.parts)):
        found.notes.append(f"holds {_some(others)} beside consolidated.00.pth, which is read")
    return found


def _open(path: Path) -> Stored:
    return StoredSafetensors(path) if path.suffix == ".safetensors" else StoredPickle(path)


def _single(path: Path) -> WeightFiles:
    file = _open(path)
    return WeightFiles([dict.fromkeys(file.shapes(), file)], [path.name])


def _indexed(index: Path) -> WeightFiles:
    """The parts that an index lists. transformers reads all that they hold, and of a name in several parts the last by
    name; the map itself only says which parts there are."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index}: damaged: it has no weight_map")
    files: dict[str, Stored] = {}
    for name in sorted(set(weight_map.values())):
        if not name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{index}: names a file outside its folder: {name}")
        if not (index.parent / name).is_file():
            raise UserError(f"{index.parent / name}: missing, {index.name} lists it")
        files[name] = _open(index.parent / name)
    found: dict[str, Stored] = {}
    repeated: dict[str, list[str]] = {}
    for name, file in files.items():
        for key in file.shapes():
            if key in found:
                repeated.setdefault(key, [str(found[key].path.relative_to(index.parent))]).append(name)
            found[key] = file
    for key, names in repeated.items():
        _check_repeated(index, key, names, weight_map.get(key), files)
    notes = []
    if repeated:
        key, names = next(iter(repeated.items()))
        more = f", as are {len(repeated) - 1} more tensors" if len(repeated) > 1 else ""
        notes.append(f"{key} is in {' and '.join(names)}{more}; the last is read, as by transformers")
    lost = {
        key: f"{index.parent / name}: has no {key}, {index.name} says so"
        for key, name in weight_map.items()
        if key not in found
    }
    unlisted = {key: file.path.name for key, file in found.items() if key not in weight_map}
    return WeightFiles([found], list(files), notes, lost, unlisted)


def _check_repeated(index: Path, key: str, names: list[str], named: str | None, files: Mapping[str, Stored]) -> None:
    """A tensor in several parts, of which the index means another than transformers reads, must be the same in both."""
    if named is None or named == names[-1] or named not in names:
        return
    if not _same_tensor(index.parent / named, index.parent / names[-1], key):
        raise UserError(
            f"{index.parent / names[-1]}: holds {key}, which another part holds too, with other values: {index.name} "
            f"means the one in {named}, transformers reads the one in {names[-1]}; take one of them out"
        )


def _same_tensor(first: Path, second: Path, key: str) -> bool:
    held = []
    for file in (_open(first), _open(second)):
        dtype, box = file.dtype(key), whole(file.shapes()[key])
        if dtype is None:
            return False
        held.append(torch.empty(box_shape(box), dtype=dtype))
        file.read(BoxPair(key, 0, box, key, box), held[-1])
    return held[0].dtype == held[1].dtype and torch.equal(held[0], held[1])


def _others(path: Path, read: set[str]) -> list[str]:
    """Files with weights that are not read, by name, and a folder of Meta's."""
    names = {file.name for pattern in OTHER_WEIGHTS for file in path.glob(pattern) if file.is_file()}
    names = {name for name in names - read if not name.startswith("adapter_model")}
    parts = {name for name in names if name.endswith(".index.json")}
    for name in parts:  # an index that leads to what is read is no other set
        try:
            listed = set(read_json(path / name).get("weight_map", {}).values())
        except (UserError, AttributeError, TypeError):
            continue
        if listed and listed <= read:
            names.discard(name)
    original = path / "original"
    meta = original.is_dir() and any(original.glob("consolidated.*"))
    return sorted(names) + (["original/consolidated.*"] if meta else [])


def _instead(path: Path) -> str:
    """What there is in the place of weights that are looked for, and what can be done."""
    parts = sorted(file.name for pattern in OTHER_WEIGHTS for file in path.glob(pattern) if file.is_file())
    adapters = [name for name in parts if name.startswith("adapter_model")]
    if adapters or (path / "adapter_config.json").is_file():
        return ", but an adapter: merge it into its base model first, with peft's merge_and_unload"
    if any(name.endswith(".pth") for name in parts) and (path / "params.json").is_file():
        return f", but {_some(parts)} and params.json, as Meta writes them: move config.json out to read those"
    if parts and all(re.search(r"-\d{5}-of-\d{5}\.", name) for name in parts):
        return f", but {_some(parts)} without an index that lists them"
    parts += sorted(file.name for pattern in FOREIGN_FORMS for file in path.glob(pattern))
    return f", but {_some(parts)}, which is not read; rename or convert it" if parts else ""


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
