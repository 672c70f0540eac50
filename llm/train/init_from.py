"""The weights that a new run begins with, where they come from elsewhere: each rank reads its own part."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from llm.adapters.vocabulary import grown
from llm.boxes import Box, box_shape
from llm.checkpoint.frozen import Origin, Taken
from llm.checkpoint.weights import Weights
from llm.errors import UserError
from llm.foreign.export import meaning
from llm.parallel.build import fill_int8
from llm.parallel.engine.engine import Engine
from llm.parallel.engine.state import OwnedFragment
from llm.parameters import ParameterTable
from llm.pretrained import adapter_of, weights_of
from llm.train.config import ModelSection


def read_weights(
    engine: Engine, model: ModelSection, path: Path, may_grow: bool = False
) -> tuple[Callable[[], None], list[str]]:
    """Read this rank's masters, and what is frozen, from the folder that model.init_from means; a function that puts
    masters in place, and lines that say what was taken, and what of the model is not as it was there. Adapters, which
    that model has none of, stay as they are. may_grow: the model may have more tokens here. UserError where a parameter
    has another shape or is not there.
    """
    notes: list[str] = []
    args, weights = weights_of(path, notes.append)
    if may_grow and model.vocab_size > args.vocab_size:
        new = model.vocab_size - args.vocab_size
        notes.append(f"rows of {new} new tokens begin as the mean of the {args.vocab_size:,} there")
        args, weights = grown(args, weights, model.vocab_size)
    shapes = ParameterTable.of(model.merged).shapes
    refuse_other_shapes(path, ParameterTable.of(args).shapes, shapes)
    before, now = meaning(args), meaning(model)
    lines = [f"began with the weights of {path}", *(f"note: {line}" for line in notes)]
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    lines += [f"note: {key} was {before.get(key)} there and is {now.get(key)} here" for key in changed]
    read_frozen(engine, weights)
    loaded = [
        (fragment.values, read_fragment(weights, fragment))
        for fragment in engine.state.fragments()
        if fragment.kind in ("master", "ema") and fragment.name in shapes  # an average begins with the weights
    ]

    def apply() -> None:
        for values, read in loaded:
            values.copy_(read)
        engine.finish_load()

    return apply, lines


def read_adapter(engine: Engine, path: Path, base: Origin) -> tuple[Callable[[], None], list[str]]:
    """Read this rank's masters of the adapter in the folder that lora.init_from means; what `read_weights` returns.
    base: where the run's own base comes from, which must be that of the adapter. UserError else.
    """
    found = adapter_of(path, base.path if isinstance(base, Taken) else None)
    if found.origin not in (None, base) and (
        not isinstance(base, Taken) or getattr(found.origin, "digest", None) != base.digest
    ):
        raise UserError(
            f"lora.init_from={path}: its adapter belongs to {described(found.origin)}, and not to {described(base)}; "
            f"give that base as model.init_from, or leave it out"
        )
    loaded = [
        (fragment.values, read_fragment(found.weights, fragment))
        for fragment in engine.state.fragments()
        if fragment.kind in ("master", "ema") and engine.replica.table[fragment.name].kind == "adapter"
    ]

    def apply() -> None:
        for values, read in loaded:
            values.copy_(read)
        engine.finish_load()

    return apply, [f"began with the adapter of {path}"]


def described(origin: Origin) -> str:
    """Where a base comes from, in words."""
    if isinstance(origin, Taken):
        return f"the weights of {origin.path}"
    return f"the initial weights of train.seed={origin.seed}"


def read_frozen(engine: Engine, weights: Weights) -> None:
    """Read this rank's part of what does not train straight into place: after an error it may hold anything. Forwards
    see it after `Engine.finish_load`.
    """
    for fragment in engine.state.frozen_fragments():
        fragment.values.copy_(read_fragment(weights, fragment))
    fill_int8(engine.model, engine.replica.table, engine.grid, weights.read)


def read_fragment(weights: Weights, fragment: OwnedFragment) -> Tensor:
    """The values of a fragment, float32."""
    return read_range(weights, fragment.name, fragment.box, fragment.start, fragment.values.numel())


def refuse_other_shapes(path: Path, theirs: dict[str, tuple[int, ...]], ours: dict[str, tuple[int, ...]]) -> None:
    """UserError naming the first parameter that has another shape in the folder, or is in one of the two alone."""
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise UserError(
                f"model.init_from={path}: {name} has shape {_shape(theirs, name)} there, {_shape(ours, name)} here"
            )


def _shape(shapes: dict[str, tuple[int, ...]], name: str) -> str:
    return str(shapes[name]) if name in shapes else "none"


def read_range(weights: Weights, name: str, box: Box, start: int, count: int) -> Tensor:
    """Values [start, start + count) of the flattened box, float32: of the rows that hold them, no others are read."""
    if count == 0:
        return torch.empty(0)
    (first, _), *rest = box
    row = torch.Size(box_shape(tuple(rest))).numel()
    low, high = start // row, -(-(start + count) // row)
    part = ((first + low, first + high), *rest)
    values = weights.read(name, part, torch.empty(box_shape(part), dtype=torch.float32))
    return values.view(-1)[start - low * row : start - low * row + count]
