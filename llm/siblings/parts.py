"""Classes of a user's own in the places of a model's attention, feed-forwards and layers.

A sibling's model takes them beside its config. They are subclasses of the sibling's classes; each makes itself by
`of_layer(args, spec)`, with the arguments that the sibling's document gives its constructor. Parameters that the class
it replaces has, too, get the model's initial values; those of its own keep what the class gave them. All are parameters
of the model like others: they train, and are saved beside the names of the classes, without which no file is read.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llm.args import LayerSpec, ModelArgs
from llm.errors import UserError
from llm.layers.block import Block
from llm.layers.lora import Adapted
from llm.layers.moe import Experts
from llm.model import LLM

Part = type[Any]
"""A class of modules with a class method of_layer(args, spec): the module of one layer, called as the one whose place
it takes. Of attention also with cross=True, for a decoder's attention to the encoder."""


@dataclass(frozen=True)
class Parts:
    """The classes that a model is made of; None = the sibling's own."""

    attention: Part | None = None
    feed_forward: Part | None = None
    """Of dense layers; experts stay as they are."""
    encoder_layer: Part | None = None
    """Layers without cross attention."""
    decoder_layer: Part | None = None
    """Layers with cross attention."""

    def __bool__(self) -> bool:
        return any(getattr(self, entry.name) is not None for entry in fields(self))

    def names(self) -> dict[str, str]:
        """The names of the classes that are given, by the places that they take."""
        given = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {place: part.__name__ for place, part in given.items() if part is not None}

    def check(self, bases: Mapping[str, type]) -> None:
        """ValueError where one is no subclass of the sibling's class for its place."""
        for entry in fields(self):
            part = getattr(self, entry.name)
            if part is None:
                continue
            if entry.name not in bases:
                raise ValueError(f"{entry.name}={part}: this model has none; it takes {', '.join(bases)}")
            if not (isinstance(part, type) and issubclass(part, bases[entry.name])):
                raise ValueError(f"{entry.name}={part!r}: expected a subclass of {bases[entry.name].__name__}")


def installed(model: LLM, parts: Parts) -> LLM:
    """The model with these classes in the places of its own, in place."""
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, Block)}
    for name, block in blocks.items():
        layer = parts.decoder_layer if block.spec.cross else parts.encoder_layer
        if layer is not None:
            block = _put(model, name, layer, model.args, block.spec)
        if parts.attention is not None and block.spec.attention is not None:
            _put(model, f"{name}.attention", parts.attention, model.args, block.spec)
        if parts.attention is not None and block.spec.cross:
            _put(model, f"{name}.cross", parts.attention, model.args, block.spec, cross=True)
        if parts.feed_forward is not None and block.spec.ffn == "dense":
            _put(model, f"{name}.feed_forward", parts.feed_forward, model.args, block.spec)
    return model


def _put(model: LLM, name: str, part: Part, args: ModelArgs, spec: LayerSpec, **how: bool) -> Any:
    """Put a part in the place of a module of the model, with its values, device, dtype and mode."""
    before = model.get_submodule(name)
    like = next(model.parameters())
    with torch.device(like.device):
        made = part.of_layer(args, spec, **how).to(like.dtype)
    made.train(before.training)
    _take_values(made, before)
    holder, _, last = name.rpartition(".")
    setattr(model.get_submodule(holder), last, made)
    return made


@torch.no_grad()
def _take_values(made: nn.Module, before: nn.Module) -> None:
    """Values of parameters of the same name and shape, and the numbers by which random choices are made."""
    there = dict(before.named_parameters())
    for name, parameter in made.named_parameters():
        if name in there and there[name].shape == parameter.shape:
            parameter.copy_(there[name])
    modules = dict(before.named_modules())
    for name, module in made.named_modules():
        other = modules.get(name)
        if isinstance(module, Adapted) and isinstance(other, Adapted):
            module.site = other.site
        elif isinstance(module, Experts) and isinstance(other, Experts):
            module.sites = other.sites


def check_names(path: Path, saved: Mapping[str, str], given: Parts) -> None:
    """UserError where a saved model has other classes than those that are given to read it."""
    if dict(saved) != given.names():
        needed = ", ".join(f"{place}={name}" for place, name in saved.items()) or "no classes of its own"
        got = ", ".join(f"{place}={name}" for place, name in given.names().items()) or "none"
        raise UserError(f"{path}: was saved with {needed}; given are {got}")
