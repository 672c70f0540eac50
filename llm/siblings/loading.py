"""Reading a sibling's model from a folder: what the files have of it, and what not."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import nn

from llm.args import ModelArgs
from llm.errors import UserError
from llm.parameters import ParameterTable
from llm.siblings.folder import INSIDE, Shapes, Tensors

Model = TypeVar("Model", bound=nn.Module)
LOG = logging.getLogger(__name__)
SHOWN = 4
"""Names that a report lists of each kind."""


class LoadReport(NamedTuple):
    """What `from_pretrained` found, by names of the state dict."""

    missing_keys: tuple[str, ...]
    """Parameters that the files do not have; they keep their initial values."""
    unexpected_keys: tuple[str, ...]
    """Tensors of the files that the model has no place for; they are left out."""

    def __str__(self) -> str:
        parts = (("misses", self.missing_keys), ("has, beyond the model,", self.unexpected_keys))
        return "; ".join(f"{verb} {_some(keys)}" for verb, keys in parts if keys) or "has the whole model"


def _some(keys: tuple[str, ...]) -> str:
    return ", ".join(keys[:SHOWN]) + (f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else "")


def refuse_pickle(safe_serialization: bool) -> None:
    """ValueError where a pickle is asked for."""
    if not safe_serialization:
        raise ValueError("safe_serialization=False: a pickle can run code when read, so only safetensors are written")


def usable(device: str | torch.device | None) -> torch.device:
    """UserError where there is no such device."""
    try:
        return torch.empty(0, device=device or torch.get_default_device()).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device={device} cannot be used here: {reason}") from None


def shapes_of(args: ModelArgs) -> Shapes:
    """The parameters of a sibling's model."""
    return {f"{INSIDE}{name}": shape for name, shape in ParameterTable.of(args).shapes.items()}


def compared(ours: Shapes, tensors: Tensors, path: Path, strict: bool) -> LoadReport:
    """What the files miss and have beyond the model's parameters. UserError where that is not allowed, or shapes
    differ."""
    report = LoadReport(
        tuple(name for name in ours if name not in tensors.shapes),
        tuple(sorted(name for name in tensors.shapes if name not in ours)),
    )
    both = [name for name in ours if name in tensors.shapes]
    for name in both:
        if tensors.shapes[name] != ours[name]:
            raise UserError(f"{path}: {name} has shape {tensors.shapes[name]}, expected {ours[name]}")
    if not both:
        raise UserError(f"{path}: none of its {len(tensors.shapes)} tensors is a parameter of the model: {report}")
    if any(report):
        if strict:
            raise UserError(f"{path}: {report}; strict=False loads the rest")
        LOG.warning("note: %s: %s", path, report)
    return report


def unfilled(build: Callable[[], Model], drawn: bool) -> Model:
    """A model on the CPU, whose initial values are drawn only where some of them stay."""
    if drawn:
        return build()
    with torch.device("meta"):
        model = build()
    model.to_empty(device="cpu")
    for buffer in model.buffers():  # counts of a training step, of no use to a finished model
        buffer.zero_()
    return model


@torch.no_grad()
def fill(model: nn.Module, tensors: Tensors) -> None:
    """Copy into the model what the files have of it."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in tensors.shapes:
            tensors.read(name, tensor)
