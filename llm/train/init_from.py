"""The weights that a new run begins with, where they come from elsewhere: each rank reads its own part."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from llm.adapters.vocabulary import grown
from llm.args import ModelArgs
from llm.args.model import OF_OUTPUTS, OUTPUTS, same_head
from llm.boxes import Box, box_shape
from llm.checkpoint.frozen import Origin, Taken
from llm.checkpoint.weights import Weights
from llm.errors import UserError
from llm.foreign.export import meaning
from llm.layers.prediction import PREDICTION
from llm.parallel.build import fill_int8
from llm.parallel.engine.engine import Engine
from llm.parallel.engine.state import OwnedFragment
from llm.parameters import ParameterTable
from llm.pretrained import adapter_of, weights_of
from llm.train.config import ModelSection

HEAD_NAMES = (f"{PREDICTION}.weight", f"{PREDICTION}.bias")
MOST_NAMES = 8
"""Of outputs, in a line."""

def read_weights(
    engine: Engine, model: ModelSection, path: Path, may_grow: bool = False
) -> tuple[Callable[[], None], list[str]]:
    """Read this rank's masters, and what is frozen, from the folder that model.init_from means; a function that puts
    masters in place, and lines that say what was taken, and what of the model is not as it was there. Adapters, which
    that model has none of, stay as they are, and so does a prediction head that is another one there. may_grow: the
    model may have more tokens here. UserError where a parameter has another shape or is not there.
    """
    notes: list[str] = []
    args, weights = weights_of(path, notes.append)
    if may_grow and model.vocab_size > args.vocab_size:
        new = model.vocab_size - args.vocab_size
        notes.append(f"rows of {new} new tokens begin as the mean of the {args.vocab_size:,} there")
        args, weights = grown(args, weights, model.vocab_size)
    taken = shapes_taken(path, args, model.merged, engine.replica.table)
    if not same_head(args, model):
        notes.append(_other_head(args, model))
    before, now = meaning(args), meaning(model)
    lines = [f"began with the weights of {path}", *(f"note: {line}" for line in notes)]
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    changed = [key for key in changed if same_head(args, model) or key not in (*OUTPUTS, *OF_OUTPUTS)]  # said already
    lines += [f"note: {key} was {before.get(key)} there and is {now.get(key)} here" for key in changed]
    read_frozen(engine, weights)
    loaded = [
        (fragment.values, read_fragment(weights, fragment))
        for fragment in engine.state.fragments()
        if fragment.kind in ("master", "ema") and fragment.name in taken  # an average begins with the weights
    ]

    def apply() -> None:
        for values, read in loaded:
            values.copy_(read)
        engine.finish_load()

    return apply, lines


def read_adapter(engine: Engine, path: Path, base: Origin) -> tuple[Callable[[], None], list[str]]:
    """Read this rank's masters of the adapter in the folder that lora.init_from means, and of the prediction head that
    trained beside it; what `read_weights` returns. base: where the run's own base comes from, which must be that of the
    adapter. UserError else.
    """
    found = adapter_of(path, base.path if isinstance(base, Taken) else None)
    if found.origin not in (None, base) and (
        not isinstance(base, Taken) or getattr(found.origin, "digest", None) != base.digest
    ):
        raise UserError(
            f"lora.init_from={path}: its adapter belongs to {described(found.origin)}, and not to {described(base)}; "
            f"give that base as model.init_from, or leave it out"
        )
    table, here = engine.replica.table, engine.model.args
    taken, lines = {name for name, row in table.items() if row.kind == "adapter"}, [f"began with the adapter of {path}"]
    if found.head is not None and same_head(found.head, here):
        taken |= {name for name, row in table.items() if row.beside_adapters}
    elif found.head is not None:
        lines.append(f"note: {_other_head(found.head, here)}")
    loaded = [
        (fragment.values, read_fragment(found.weights, fragment))
        for fragment in engine.state.fragments()
        if fragment.kind in ("master", "ema") and fragment.name in taken
    ]

    def apply() -> None:
        for values, read in loaded:
            values.copy_(read)
        engine.finish_load()

    return apply, lines


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


def shapes_taken(path: Path, there: ModelArgs, here: ModelArgs, table: ParameterTable) -> dict[str, tuple[int, ...]]:
    """Of the parameters that a run whose model, without adapters, is `here` begins with, where `there` is the folder's:
    all, but those of a prediction head whose outputs are others. table: the run's. UserError naming a parameter where
    another one has another shape or is in one of the two alone, or one would neither be read nor train.
    """
    theirs, ours = (ParameterTable.of(args).shapes for args in (there, here))
    if not same_head(there, here):
        theirs, ours = ({k: v for k, v in shapes.items() if k not in HEAD_NAMES} for shapes in (theirs, ours))
    refuse_other_shapes(path, theirs, ours)
    for name in HEAD_NAMES:
        if name in table and name not in ours and not table[name].trainable:
            raise UserError(f"train.freeze: {name} begins anew, as model.init_from={path} has not these outputs")
    return ours


def _other_head(there: ModelArgs, here: ModelArgs) -> str:
    """What becomes of a prediction head that is not the same, in words."""
    if not here.n_prediction:
        return f"the prediction head ({_outputs(there)}) is left out"
    what = f"has a prediction head ({_outputs(there)})" if there.n_prediction else "has no prediction head"
    return f"the prediction head ({_outputs(here)}) begins anew, as that model {what}"


def _outputs(args: ModelArgs) -> str:
    names = args.prediction_names or ()
    shown = f": {', '.join(names[:MOST_NAMES])}{', ...' if len(names) > MOST_NAMES else ''}" if names else ""
    return f"{args.prediction}, n_prediction={args.n_prediction}{shown}"


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
