"""The frozen weights of a model in int8: a rank's part of each, rounded as the whole is, so that every layout computes
with the same values.

A scale is of all that a product sums over (dimension 1), also where tensor parallelism cuts that. So a rank reads that
dimension whole, of one matrix at a time.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from llm.boxes import Box, box_shape
from llm.kernels.int8 import Int8Weight

Read = Callable[[str, Box, Tensor], Tensor]
"""Copies a box of a parameter into a float32 tensor of its shape, and returns that."""
SUMMED = 1
"""The dimension over which a product sums."""


def use_int8(module: nn.Module, name: str, shape: tuple[int, ...], device: torch.device) -> Int8Weight:
    """Let a module compute with an int8 weight of this shape, values unset, in place of its parameter `name`."""
    del module._parameters[name]
    weight = Int8Weight.empty(shape, device)
    setattr(module, name, weight)
    return weight


def int8_weights(model: nn.Module) -> Iterator[tuple[str, Int8Weight]]:
    """The int8 weights of a model, by the names of the parameters in whose place they are."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Int8Weight):
                yield f"{path}.{name}" if path else name, value


def rounded(read: Read, name: str, shape: tuple[int, ...], box: Box) -> Iterator[tuple[slice, Int8Weight]]:
    """A box of a parameter of this whole shape in int8, in parts along the box's first dimension: a matrix is one, a
    stack has one for each of its matrices.
    """
    first, stop = box[0]
    step = 1 if len(shape) > 2 else max(stop - first, 1)
    for start in range(first, stop, step):
        place = ((start, start + step), (0, shape[SUMMED]), *box[SUMMED + 1 :])
        weight = Int8Weight.of(read(name, place, torch.empty(box_shape(place))))
        here = slice(*box[SUMMED])
        yield slice(start - first, start - first + step), Int8Weight(weight.values[:, here], weight.scale)


def fill(weight: Int8Weight, read: Read, name: str, shape: tuple[int, ...], box: Box) -> None:
    """Put a box of a parameter into `weight`."""
    for part, values in rounded(read, name, shape, box):
        weight[part].copy_(values)


class Rounded:
    """Weights as a run computes with them that keeps some in int8: those rounded, the others as they are."""

    def __init__(self, read: Read, int8_shapes: dict[str, tuple[int, ...]]) -> None:
        """int8_shapes: of the whole parameters that are kept so, by name."""
        self._read, self._shapes = read, int8_shapes

    def read(self, name: str, box: Box, out: Tensor) -> Tensor:
        """Copy a box of a parameter into `out`, of the box's shape; returns it."""
        if name not in self._shapes:
            return self._read(name, box, out)
        for part, values in rounded(self._read, name, self._shapes[name], box):
            out[part].copy_(values.dequantised())
        return out
