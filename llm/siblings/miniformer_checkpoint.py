"""Checkpoints of Lightning without pickle: a folder with the tensors in one safetensors file and all else as JSON."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor

from llm.atomic import new_directory
from llm.errors import UserError
from llm.siblings.folder import load_tensors, save_tensors

TENSORS, REST = "tensors.safetensors", "state.json"
TENSOR, PAIRS, TUPLE, PATH = "tensor", "pairs", "tuple", "path"
"""What stands for a value that JSON has no form for: {kind: ...}."""


class SafetensorsIO(CheckpointIO):
    """Give it to Lightning's trainer: Trainer(plugins=[SafetensorsIO()])."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a folder, whole or not at all, in the place of one that is there. ValueError naming a value that is
        neither a tensor nor of JSON."""
        tensors: dict[str, Tensor] = {}
        rest = _written(checkpoint, "checkpoint", tensors)
        self.remove_checkpoint(path)
        with new_directory(Path(path)) as temporary:
            save_tensors(temporary / TENSORS, tensors, {"format": "pt"})
            (temporary / REST).write_text(json.dumps(rest), encoding="utf-8")

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read one. UserError naming the file where it is none."""
        folder = Path(path)
        tensors = load_tensors(folder / TENSORS)[0]
        try:
            rest = json.loads((folder / REST).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{folder / REST}: cannot be read ({error})") from None
        place = map_location if isinstance(map_location, str | torch.device) else None
        found: dict[str, Any] = _read(rest, {name: tensor.to(place) for name, tensor in tensors.items()})
        return found

    def remove_checkpoint(self, path: Any) -> None:
        """Remove one, if it is there."""
        if Path(path).is_dir():
            shutil.rmtree(path)


def _written(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON, its tensors put aside."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous()
        return {TENSOR: name}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return {PATH: str(value)}
    if isinstance(value, dict):  # keys may be numbers
        return {PAIRS: [[key, _written(inner, f"{name}.{key}", tensors)] for key, inner in value.items()]}
    if isinstance(value, list | tuple):
        items = [_written(inner, f"{name}.{i}", tensors) for i, inner in enumerate(value)]
        return items if isinstance(value, list) else {TUPLE: items}
    raise ValueError(f"{name} is a {type(value).__name__}, which a checkpoint without pickle cannot hold")


def _read(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_read(inner, tensors) for inner in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == TENSOR:
        return tensors[inner]
    if kind == PATH:
        return Path(inner)
    if kind == TUPLE:
        return tuple(_read(item, tensors) for item in inner)
    return {key: _read(item, tensors) for key, item in inner}
