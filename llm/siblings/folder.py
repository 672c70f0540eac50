"""A model's folder as the siblings have it, config.json beside model.safetensors, which is a model folder of ours too:
its manifest says where in model.safetensors each parameter lies, with digests.

So other tools find the two files that they know, under the names of the module's state dict, and `LLM.from_pretrained`,
runs and `launch/generate.py` a folder like all others. Without the manifest the two files are enough for the sibling.
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, TypeVar

import torch
from torch import Tensor

from llm.args import ModelArgs
from llm.atomic import new_file, write_file
from llm.boxes import whole
from llm.checkpoint.fragments import BLANK, BLOCK_BYTES, DTYPES, FileOutline, Fragment, write_values
from llm.checkpoint.reader import FORMAT, MANIFEST, VERSION, resolve, seal
from llm.checkpoint.run_folder import TOKENIZER_FOLDER, run_tokenizer_config, save_tokenizer
from llm.errors import UserError
from llm.model import LLM
from llm.parameters import ParameterTable
from llm.pretrained import is_foreign, weights_of
from llm.safetensors_file import DTYPES as KNOWN
from llm.safetensors_file import SafetensorsFile, header_bytes, write_tensors
from llm.siblings.parts import Parts, check_names
from llm.tokenizer import Tokenizer, load_tokenizer

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
PARTS = "parts"
"""Key of config.json under which the classes stand that a user gave to the model."""
INSIDE = "llm."
"""What stands before a parameter's name in the state dict of an adapter, which holds an LLM."""

Shapes = Mapping[str, tuple[int, ...]]


class FamilyConfig(Protocol):
    """The config of a sibling's models."""

    model_type: ClassVar[str]
    """What its config.json says of itself."""

    @classmethod
    def of(cls, args: ModelArgs) -> Self:
        """The config that says what a model is."""

    @classmethod
    def from_text(cls, text: str | bytes, name: str) -> Self:
        """The config that JSON says. UserError naming where it stands, `name`, and the key."""

    def to_dict(self) -> dict[str, Any]:
        """What JSON says of it."""


Config = TypeVar("Config", bound=FamilyConfig)


class Tensors(Protocol):
    """Stored tensors by the names of a state dict."""

    shapes: Shapes
    dtype: torch.dtype

    def read(self, name: str, out: Tensor) -> None:
        """Copy one into a tensor of its shape."""


class FileTensors:
    """Those of safetensors files."""

    def __init__(self, files: list[Path]) -> None:
        self._files = {name: opened for file in files for opened in (opened_whole(file),) for name in opened.entries}
        self.shapes: Shapes = {name: file.entries[name].shape for name, file in self._files.items()}
        if not self.shapes:
            raise UserError(f"{files[0]}: holds no tensors")
        self.dtype = Counter(file.entries[name].dtype for name, file in self._files.items()).most_common(1)[0][0]

    def read(self, name: str, out: Tensor) -> None:
        self._files[name].read(name, whole(self.shapes[name]), out)


def opened_whole(file: Path) -> SafetensorsFile:
    """A safetensors file all of whose tensors can be read. DamagedFile or UserError naming it."""
    opened = SafetensorsFile(file)
    for name, tensor in opened.unread.items():
        raise UserError(f"{file}: {name} is {tensor.dtype}; known are {', '.join(KNOWN)}")
    return opened


class ModelTensors:
    """Those of whatever LLM.from_pretrained reads."""

    def __init__(self, path: Path) -> None:
        self.args, self._weights = weights_of(path)
        self.shapes: Shapes = {f"{INSIDE}{name}": shape for name, shape in ParameterTable.of(self.args).shapes.items()}
        self.dtype = torch.float32 if is_foreign(path) else DTYPES[resolve(path).dtype()]

    def read(self, name: str, out: Tensor) -> None:
        self._weights.read(name.removeprefix(INSIDE), whole(self.shapes[name]), out)


def open_folder(path: Path, family: type[Config], parts: Parts | None = None) -> tuple[Config, Tensors]:
    """The model in a folder that `save_folder` wrote, or that LLM.from_pretrained reads, with the classes that it was
    saved with, if it was with any. UserError naming the file where there is none, or where the classes are others.
    """
    given = Parts() if parts is None else parts
    if not path.is_dir():
        raise UserError(f"{path}: {'is a file; give its folder' if path.exists() else 'no such folder'}")
    if (path / CONFIG).is_file() and says(path / CONFIG, family.model_type):
        text = (path / CONFIG).read_bytes()
        check_names(path, json.loads(text).get(PARTS, {}), given)
        return family.from_text(text, str(path / CONFIG)), FileTensors(_weight_files(path))
    check_names(path, {}, given)
    tensors = ModelTensors(path)
    return family.of(tensors.args), tensors


def says(file: Path, model_type: str) -> bool:
    """Whether a config.json is of a family: it says so, or says of none and has the siblings' spelling of the width."""
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("model_type", model_type if "d_model" in found else "") == model_type


def _weight_files(path: Path) -> list[Path]:
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    if (path / INDEX).is_file():
        try:
            names = sorted(set(json.loads((path / INDEX).read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise UserError(f"{path / INDEX}: is no index of safetensors files") from None
        if names and all(isinstance(name, str) and Path(name).name == name for name in names):
            return [path / name for name in names]
        raise UserError(f"{path / INDEX}: names files outside its folder")
    raise UserError(f"{path}: holds no {WEIGHTS}; pickled weights are not read")


def save_folder(
    path: Path, model: LLM, config: FamilyConfig, tokenizer: Tokenizer | None, parts: Parts | None = None
) -> None:
    """Write the folder, or write it anew; each file whole or not at all, the manifest last. Without a tokenizer one
    that lies there stays. parts: the classes that a user gave to the model: no manifest then, as nothing else can run
    the model. UserError where the folder holds another model.
    """
    _refuse_others(path, config.model_type)
    path.mkdir(parents=True, exist_ok=True)
    (path / MANIFEST).unlink(missing_ok=True)
    if tokenizer is not None:
        save_tokenizer(tokenizer, path)
    said = {"model_type": config.model_type, **config.to_dict()}
    if parts:
        save_tensors(path / WEIGHTS, {f"{INSIDE}{name}": t for name, t in model.state_dict().items()}, {"format": "pt"})
        write_file(path / CONFIG, _json({**said, PARTS: parts.names()}))
        return
    outline = _outline(model)
    values = (parameter for _, parameter in model.named_parameters())
    with new_file(path / WEIGHTS) as file:
        fragments = write_values(file, outline, values)
    write_file(path / CONFIG, _json(said))
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "step": 0,
        "parameters": {name: list(parameter.shape) for name, parameter in model.named_parameters()},
        "files": {WEIGHTS: outline.record.to_json()},
        "fragments": [fragment.to_json() for fragment in fragments],
        "meta": {
            "config": {"model": model.args.model_dump(mode="json")},
            "tokenizer": _fingerprint(path, tokenizer),
            "source": {},
        },
    }
    write_file(path / MANIFEST, seal(manifest))


def _json(said: dict[str, Any]) -> bytes:
    return (json.dumps(said, indent=2) + "\n").encode()


def _refuse_others(path: Path, model_type: str) -> None:
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file; give a folder")
    held = [name for name in (CONFIG, WEIGHTS, INDEX, MANIFEST, "checkpoints") if (path / name).exists()]
    if held and not ((path / CONFIG).is_file() and says(path / CONFIG, model_type)) or INDEX in held:
        raise UserError(f"{path}: holds another model ({held[0]}); give another folder")


def _outline(model: LLM) -> FileOutline:
    """model.safetensors: whole parameters under the names of the state dict."""
    parameters = dict(model.named_parameters())
    dtype = next(iter(parameters.values())).dtype
    names = {stored: name for name, stored in DTYPES.items()}
    if dtype not in names or any(parameter.dtype != dtype for parameter in parameters.values()):
        raise ValueError(f"a model is saved in one of {', '.join(DTYPES)}; move it there first, as by model.float()")
    header = header_bytes(
        {f"{INSIDE}{name}": (dtype, tuple(parameter.shape)) for name, parameter in parameters.items()}, {"format": "pt"}
    )
    fragments, at = [], len(header)
    for name, parameter in parameters.items():
        size = parameter.numel() * dtype.itemsize
        box, blank = whole(tuple(parameter.shape)), (BLANK,) * -(-size // BLOCK_BYTES)
        fragments.append(
            Fragment(name, "master", box, 0, parameter.numel(), names[dtype], WEIGHTS, at, BLOCK_BYTES, None, blank)
        )
        at += size
    return FileOutline(WEIGHTS, header, tuple(fragments))


def _fingerprint(path: Path, tokenizer: Tokenizer | None) -> str | None:
    """Of the tokenizer in the folder."""
    if tokenizer is None and (path / TOKENIZER_FOLDER).is_dir():
        config, folder = run_tokenizer_config(path)
        tokenizer = load_tokenizer(config, base=folder)
    return None if tokenizer is None else tokenizer.fingerprint


def save_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write one safetensors file, whole or not at all, in the place of one that is there."""
    described = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with new_file(file) as temporary:
        write_tensors(temporary, described, iter(tensors.values()), dict(metadata))


def load_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, and its metadata. DamagedFile or UserError naming it."""
    opened = opened_whole(file)
    found = {}
    for name, entry in opened.entries.items():
        found[name] = torch.empty(entry.shape, dtype=entry.dtype)
        opened.read(name, whole(entry.shape), found[name])
    return found, opened.metadata
