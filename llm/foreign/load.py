"""Parameters filled from foreign tensors: from any source of them, whole or a box; and the translation of foreign state
dicts, by which `load_state_dict` takes foreign names as well as ours.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import Protocol

import torch
from torch import Tensor, nn

from llm.args import ModelArgs
from llm.boxes import Box, box_shape, whole
from llm.checkpoint.weights import boxed
from llm.errors import UserError
from llm.foreign.family import Family, Match, best_match, families, match, own_names
from llm.foreign.transforms import BoxPair, Shape
from llm.layers.foreign_names import translate_with

TWIN_ELEMENTS = 2 << 20
"""Elements of a tensor that is held twice that are compared at a time."""


class Source(Protocol):
    """Foreign tensors that lie somewhere."""

    name: str
    """Where, for messages."""

    def shapes(self) -> Mapping[tuple[int, str], Shape]:
        """Of all tensors, by (shard, key)."""

    def read(self, pair: BoxPair, out: Tensor) -> None:
        """Copy the values of pair.theirs into `out`, which has the shape of pair.mine."""


class StateDict:
    """Tensors in memory."""

    def __init__(self, tensors: Mapping[str, Tensor], name: str = "the state dict") -> None:
        self.name = name
        self._tensors = tensors

    def shapes(self) -> dict[tuple[int, str], Shape]:
        return {(0, key): tuple(tensor.shape) for key, tensor in self._tensors.items()}

    def read(self, pair: BoxPair, out: Tensor) -> None:
        out.copy_(pair.to_mine(boxed(self._tensors[pair.key], pair.theirs)))


def with_computed(tensors: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
    """Tensors in memory by the names of a family's table: what that computes in place of what it is computed from."""
    found = dict(tensors)
    for computed in family.computed:
        if computed.source in found:
            found[computed.name] = computed.compute(found.pop(computed.source))
    return found


class ForeignWeights:
    """A source whose tensors fill a whole model: its parameters by canonical name, in boxes."""

    def __init__(self, source: Source, found: Match) -> None:
        found.check(source.name)
        self.source = source
        self.family = found.family
        self._pairs: dict[str, list[BoxPair]] = {}
        self._twins: list[BoxPair] = []
        for pair in found.pairs:
            if pair.twin:
                self._twins.append(pair)
            else:
                self._pairs.setdefault(pair.name, []).append(pair)

    def read(self, name: str, box: Box, out: Tensor) -> Tensor:
        """Copy a box of parameter `name` into `out`, of the box's shape; returns it."""
        for all_of_it in self._pairs[name]:
            pair = all_of_it.within(box)
            if pair is not None:
                where = tuple((a - start, b - start) for (a, b), (start, _) in zip(pair.mine, box, strict=True))
                self.source.read(pair, boxed(out, where))
        return out

    def names(self) -> list[str]:
        """Of the parameters."""
        return list(self._pairs)

    def values_of(self, name: str, most: int) -> Iterator[tuple[str, Tensor]]:
        """(foreign name, values) of all that fills a parameter, about `most` at a time, in float64, which rounds none
        of them."""
        for pair in self._pairs[name]:
            for part in _rows_of(pair, most):
                out = torch.empty(box_shape(part.mine), dtype=torch.float64)
                self.source.read(part, out)
                yield part.key, out

    def check_twins(self) -> None:
        """UserError where tensors that hold the same parameter differ: replicas in several files, or a tied head; and
        where one that must be 0 is not.
        """
        for (shard, key), shape in self.source.shapes().items():
            if key not in self.family.zeros:
                continue
            out = torch.empty(shape)
            self.source.read(BoxPair(key, shard, whole(shape), key, whole(shape)), out)
            if out.any():
                raise UserError(f"{self.source.name}: {key} is not 0, and our models have no such thing")
        for twin in self._twins:
            for part in _rows_of(twin, TWIN_ELEMENTS):
                ours, theirs = (torch.empty(box_shape(part.mine)) for _ in range(2))
                self.read(part.name, part.mine, ours)
                self.source.read(part, theirs)
                if not torch.equal(ours, theirs):
                    raise UserError(
                        f"{self.source.name}: {twin.key}{f' of part {twin.shard}' if twin.shard else ''} holds the "
                        f"same weights as {twin.name}, but differs from it"
                    )


def _rows_of(pair: BoxPair, most: int) -> Iterator[BoxPair]:
    """A pair in parts of some rows, of about `most` elements."""
    (first, last), *rest = pair.mine
    step = max(1, most // max(1, prod(box_shape(tuple(rest)))))
    for at in range(first, last, step):
        part = pair.within(((at, min(at + step, last)), *rest))
        assert part is not None
        yield part


def identify(args: ModelArgs, ours: Mapping[str, Shape], source: Source) -> Match:
    """The family whose table fits the source best; families with the same names give the same pairs."""
    theirs = source.shapes()
    return best_match(match(family, args, ours, theirs) for family in families().values())


def translate(module: nn.Module, args: ModelArgs, place: str, state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """`state`, a foreign state dict of one of our modules, in our names; None where none of its names is foreign.

    place: what stands before the module's names in a model, with `{i}` for its layer, or `{k}` for that of the encoder.
    UserError when a foreign state dict does not fill the module or holds more, or nothing in it belongs to the module.
    """
    parameters = dict(module.named_parameters())
    others = state.keys() - parameters.keys() - {name for name, _ in module.named_buffers()}
    if not others:
        return None
    ours = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    name = f"the state dict of {type(module).__name__}"
    local = [part for family in families().values() if (part := _of(family, place)) is not None]
    sources = {part.name: StateDict(with_computed(state, part), name) for part in local}
    matches = [match(part, args, ours, sources[part.name].shapes()) for part in local]
    foreign = [
        found for found in matches if others & ({pair.key for pair in found.pairs} | own_names(found.family, args))
    ]
    if not foreign:
        if len(others) == len(state):
            raise UserError(f"{name}: none of its {len(state)} tensors is a parameter, as {min(state)}")
        needless = {key for key in others if any(part.dropped(key, args) for part in local)}
        return {key: tensor for key, tensor in state.items() if key not in needless} if needless else None
    best = best_match(foreign)
    weights = ForeignWeights(sources[best.family.name], best)
    weights.check_twins()
    return {
        name: weights.read(name, whole(shape), torch.empty_like(parameters[name], device="cpu"))
        for name, shape in ours.items()
    }


def _of(family: Family, place: str) -> Family | None:
    """The part of a family's table that belongs to one kind of module, with names as seen from there."""
    if place not in family.containers:
        return None
    theirs = family.containers[place]
    rows = tuple(
        replace(
            entry,
            theirs=entry.theirs.removeprefix(theirs),
            ours=tuple(name.removeprefix(place) for name in entry.ours),
            bias=False,
        )
        for entry in family.expanded()
        if entry.theirs.startswith(theirs) and all(name.startswith(place) for name in entry.ours)
    )
    return replace(family, rows=rows)


translate_with(translate)
