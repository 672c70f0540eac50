"""Normalisations, computed in float32 whatever the input is.

RMS norms are written with their own backward because the composed one walks the tensor about twice as often, and on a
CPU that is what costs, and because it would keep float32 copies.

Shapes: N rows, D normalised width.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llm.kernels.dtypes import wide_dtype

Mean = Callable[[Tensor], Tensor]


def layer_normalise(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension, cast back to x's dtype at the end."""
    wide, weight, bias = (t.to(wide_dtype(t)) for t in (x, weight, bias))
    return F.layer_norm(wide, weight.shape, weight, bias, eps).to(x.dtype)


def rms_normalise(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    """RMS-normalise the last dimension of x, and multiply by weight (D,) if given. Same shape and dtype as x."""
    if torch.compiler.is_compiling():  # the compiler fuses the formula by itself, and not through a custom backward
        wide = x.to(wide_dtype(x))
        y = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
        return y if weight is None else y * weight
    return _RMSNormalise.apply(x, weight, eps)


class _RMSNormalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        wide = x.to(wide_dtype(x))
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        y = (wide * scale).to(x.dtype)
        return y if weight is None else y.mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """The layer norm's kernel, given 0 as the mean, subtracts scale * mean(grad * weight), which would flow
        through the mean; the RMS norm has none, so that is added back. Its own formula would walk the tensor six times.
        """
        x, weight, scale = ctx.saved_tensors
        width = x.shape[-1]
        x_ND, grad_ND = (t.reshape(-1, width).to(scale.dtype) for t in (x, grad))
        scale_N1, wide_weight = scale.view(-1, 1), None if weight is None else weight.to(scale.dtype)
        through_mean_ND, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
            grad_ND,
            x_ND,
            [width],
            torch.zeros_like(scale_N1),
            scale_N1,
            wide_weight,
            None,
            [True, weight is not None, False],
        )
        sum_N = grad_ND.sum(-1) if wide_weight is None else torch.mv(grad_ND, wide_weight)
        grad_x_ND = through_mean_ND.addcmul_(sum_N.unsqueeze(-1), scale_N1, value=1 / width)
        grad_x = grad_x_ND.to(x.dtype).view(x.shape)
        return grad_x, None if weight is None else grad_weight.to(weight.dtype), None


def itself(x: Tensor) -> Tensor:
    """The mean over ranks of what a rank has, where there is one."""
    return x


def rms_normalise_wide(x: Tensor, eps: float, weight: Tensor, mean: Mean = itself) -> Tensor:
    """RMS-normalise the last dimension of x, whose other parts may be on other ranks, multiply by weight (D,), and cast
    back then. Same shape and dtype as x. mean: over the ranks, of what each has of its own, which it may change.
    """
    if torch.compiler.is_compiling():
        wide = x.to(wide_dtype(x))
        mean_square = mean(wide.square().mean(-1, keepdim=True))
        return (wide * torch.rsqrt(mean_square + eps) * weight).to(x.dtype)
    return _NormaliseWide.apply(x, weight, eps, mean)


class _NormaliseWide(torch.autograd.Function):
    """As _RMSNormalise; but the layer norm's kernel knows nothing of other ranks' part of the mean."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, mean: Mean) -> Tensor:
        wide = x.to(wide_dtype(x))
        root = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = mean(root.square_().div_(x.shape[-1])).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        ctx.mean = mean
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        unit = x * scale
        grad_weight = (grad * unit).flatten(0, -2).sum(0).to(weight.dtype)
        grad_unit = grad.to(scale.dtype) * weight
        through_mean = ctx.mean((grad_unit * unit).mean(-1, keepdim=True))
        grad_x = grad_unit.sub_(unit.mul_(through_mean)).mul_(scale).to(x.dtype)
        return grad_x, grad_weight, None, None
