"""Weights of one byte a value, for what does not train: w = values * scale, a scale for each output.

Dimension 1 of a weight is what a product sums over, in a Linear's (outputs, inputs) and in experts' stacks (E, inputs,
outputs); the scale has length 1 there. A product makes one matrix float for as long as it takes, and its backward makes
it again, so there is never more than one.

Shapes: R rows, D model width, F expert width, E experts.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LARGEST = 127
"""Of the values; -128 is not used, so that a weight and its negative round alike."""


@dataclass(frozen=True)
class Int8Weight:
    """A matrix, or a stack of them."""

    values: Tensor
    """int8."""
    scale: Tensor
    """float32, with length 1 in dimension 1."""

    @classmethod
    def of(cls, weight: Tensor) -> "Int8Weight":
        """The nearest to a float32 weight, whose dimension 1 is whole: each output's largest value becomes 127."""
        scale = weight.abs().amax(1, keepdim=True) / LARGEST
        values = (weight / torch.where(scale > 0, scale, 1.0)).round_()
        return cls(values.to(torch.int8), scale)

    @classmethod
    def empty(cls, shape: tuple[int, ...], device: torch.device) -> "Int8Weight":
        """One with values unset."""
        values = torch.empty(shape, dtype=torch.int8, device=device)
        return cls(values, torch.empty(shape[:1] + (1,) + shape[2:], device=device))

    @property
    def shape(self) -> torch.Size:
        """Of the weight."""
        return self.values.shape

    @property
    def nbytes(self) -> int:
        """Of values and scales."""
        return self.values.nbytes + self.scale.nbytes

    def __getitem__(self, index: int | slice) -> "Int8Weight":
        """Some of the first dimension's."""
        return Int8Weight(self.values[index], self.scale[index])

    def copy_(self, other: "Int8Weight") -> None:
        """Take over another's values."""
        self.values.copy_(other.values)
        self.scale.copy_(other.scale)

    def dequantised(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight itself."""
        return dequantised(self.values, self.scale, dtype)


def dequantised(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """values * scale, rounded once."""
    return (values * scale).to(dtype)


def int8_linear(x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, with gradients for x (..., inputs) and b alone."""
    out: Tensor = _Product.apply(x, weight.values, weight.scale, True)
    return out if bias is None else out + bias


def int8_matmul(x: Tensor, weight: Int8Weight) -> Tensor:
    """x W of one matrix of a stack, whose rows are inputs."""
    out: Tensor = _Product.apply(x, weight.values, weight.scale, False)
    return out


def int8_grouped_matmul(x_RD: Tensor, weight_EDF: Int8Weight, sizes: Tensor | list[int]) -> Tensor:
    """Multiply each group of consecutive rows by its own matrix; (R, F)."""
    groups = x_RD.split(sizes if isinstance(sizes, list) else sizes.tolist())
    return torch.cat([int8_matmul(x, weight_EDF[e]) for e, x in enumerate(groups)])


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, scale: Tensor, transposed: bool) -> Tensor:
        ctx.save_for_backward(values, scale)
        ctx.transposed = transposed
        weight = dequantised(values, scale, x.dtype)
        return F.linear(x, weight if transposed else weight.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        values, scale = ctx.saved_tensors
        weight = dequantised(values, scale, grad.dtype)
        return F.linear(grad, weight.T if ctx.transposed else weight), None, None, None
