"""Norms, computed in float32 whatever the input is: root-mean-square norms (Zhang and Sennrich 2019, arXiv:1910.07467)
and layer norms (Ba et al. 2016, arXiv:1607.06450).

RMS norms are written with their own backward because the composed one walks the tensor about twice as often, and on a
CPU that is what costs, and because it would keep float32 copies.

Shapes: N rows, D normalised width, H heads, d head width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llm.args import ModelArgs
from llm.layers.region import WHOLE, Region


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), cast back to the input's dtype, then times the weight (the order of Llama 2 to 4)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_normalise(x, self.eps, self.weight)


class WideRMSNorm(RMSNorm):
    """RMS norm that multiplies with the weight, or with 1 + weight, before it casts back (OLMo 2, Gemma)."""

    def __init__(self, dim: int, eps: float, offset: bool = False) -> None:
        super().__init__(dim, eps)
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        return rms_normalise_wide(x, self.eps, self.factor())

    def factor(self) -> Tensor:
        """What normalised values are multiplied with."""
        return self.weight.to(_accumulation_dtype(self.weight)) + 1 if self.offset else self.weight


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * weight + bias, cast back to the input's dtype at the end."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide, weight, bias = (t.to(_accumulation_dtype(t)) for t in (x, self.weight, self.bias))
        return F.layer_norm(wide, weight.shape, weight, bias, self.eps).to(x.dtype)


def make_norm(args: ModelArgs, dim: int) -> nn.Module:
    """The norm over `dim` values that the args ask for."""
    if args.norm == "layer":
        return LayerNorm(dim, args.norm_eps)
    if args.norm_offset or args.norm_fp32_weight:
        return WideRMSNorm(dim, args.norm_eps, args.norm_offset)
    return RMSNorm(dim, args.norm_eps)


def rms_normalise(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    """RMS-normalise the last dimension of x, and multiply by weight (D,) if given. Same shape and dtype as x."""
    if torch.compiler.is_compiling():  # the compiler fuses the formula by itself, and not through a custom backward
        wide = x.to(_accumulation_dtype(x))
        y = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
        return y if weight is None else y * weight
    return _RMSNormalise.apply(x, weight, eps)


class _RMSNormalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        wide = x.to(_accumulation_dtype(x))
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        y = (wide * scale).to(x.dtype)
        return y if weight is None else y.mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """The layer norm's kernel, told that the mean is 0, subtracts scale * mean(grad * weight), which would flow
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


class HeadsNorm(WideRMSNorm):
    """RMS norm over all heads (..., H, d) of a token as one, with a weight of width H d (OLMo et al. 2024,
    arXiv:2501.00656).

    Casts back after the weight, the order of OLMo 2. Where heads are on several ranks, their mean square is that of all
    ranks: each has as many heads, and a head that several have counts as often as any other.
    """

    region: Region = WHOLE
    rows: slice | None = None
    """This rank's part of the weight, where it holds the whole weight all the same."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.factor() if self.rows is None else self.factor()[self.rows]
        return rms_normalise_wide(x.flatten(-2), self.eps, weight, self.region).view_as(x)


def rms_normalise_wide(x: Tensor, eps: float, weight: Tensor, region: Region = WHOLE) -> Tensor:
    """RMS-normalise the last dimension of x, whose other parts are on other ranks of the region, multiply by weight
    (D,), and cast back then. Same shape and dtype as x."""
    if torch.compiler.is_compiling():
        wide = x.to(_accumulation_dtype(x))
        mean_square = region.mean(wide.square().mean(-1, keepdim=True))
        return (wide * torch.rsqrt(mean_square + eps) * weight).to(x.dtype)
    return _NormaliseWide.apply(x, weight, eps, region)


class _NormaliseWide(torch.autograd.Function):
    """As _RMSNormalise; but the layer norm's kernel knows nothing of other ranks' part of the mean."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, region: Region) -> Tensor:
        wide = x.to(_accumulation_dtype(x))
        root = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = region.mean(root.square_().div_(x.shape[-1])).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        ctx.region = region
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        unit = x * scale
        grad_weight = (grad * unit).flatten(0, -2).sum(0).to(weight.dtype)
        grad_unit = grad.to(scale.dtype) * weight
        through_mean = ctx.region.mean((grad_unit * unit).mean(-1, keepdim=True))
        grad_x = grad_unit.sub_(unit.mul_(through_mean)).mul_(scale).to(x.dtype)
        return grad_x, grad_weight, None, None


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
