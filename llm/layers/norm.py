"""Norms: root-mean-square norms (Zhang and Sennrich 2019, arXiv:1910.07467) and layer norms (Ba et al. 2016,
arXiv:1607.06450), computed in float32 whatever the input is.

Shapes: H heads, d head width.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from llm.args import ModelArgs
from llm.init import Constant
from llm.kernels.dtypes import wide_dtype
from llm.kernels.norms import itself, layer_normalise, rms_normalise, rms_normalise_wide
from llm.layers.parameter import ZEROS, ParamInfo, Rows
from llm.layers.region import InRegion


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
        return self.weight.to(wide_dtype(self.weight)) + 1 if self.offset else self.weight


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * weight + bias, cast back to the input's dtype at the end."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        return layer_normalise(x, self.weight, self.bias, self.eps)


def make_norm(args: ModelArgs, dim: int, eps: float | None = None, last: bool = False) -> nn.Module:
    """The norm over `dim` values that the args ask for. eps: instead of theirs. last: it follows the last layer."""
    eps = args.norm_eps if eps is None else eps
    if args.norm == "layer":
        return LayerNorm(dim, eps)
    if args.norm_offset or args.norm_fp32_weight:
        return WideRMSNorm(dim, eps, _offset(args, last))
    return RMSNorm(dim, eps)


def _offset(args: ModelArgs, last: bool) -> bool:
    return args.norm_offset and not (last and args.final_norm_plain)


def norm_rows(args: ModelArgs, dim: int, in_region: bool = False, last: bool = False) -> Rows:
    """Of what `make_norm` makes: whole on every tensor-parallel rank."""
    weight = ParamInfo((dim,), "norm", Constant(0.0 if _offset(args, last) else 1.0), in_region=in_region)
    bias = {"bias": replace(weight, init=ZEROS)} if args.norm == "layer" else {}
    return {"weight": weight, **bias}


class HeadsNorm(WideRMSNorm, InRegion):
    """RMS norm over all heads (..., H, d) of a token as one, with a weight of width H d (OLMo et al. 2024,
    arXiv:2501.00656).

    Casts back after the weight, the order of OLMo 2. Where heads are on several ranks, their mean square is that of all
    ranks: each has as many heads, and a head that several have counts as often as any other.
    """

    rows: slice | None = None
    """This rank's part of the weight, where it holds the whole weight all the same."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.factor() if self.rows is None else self.factor()[self.rows]
        return rms_normalise_wide(x.flatten(-2), self.eps, weight, self.region.mean).view_as(x)


class GroupsNorm(nn.Module, InRegion):
    """RMS norm over each of some groups of channels (..., I) by itself, with a weight of width I, in float32, whose
    result it gives.

    Where a group's channels are on several ranks, its mean square is that of all ranks.
    """

    def __init__(self, dim: int, groups: int, eps: float) -> None:
        super().__init__()
        self.eps, self.groups, self.over_ranks = eps, groups, False
        self.weight = nn.Parameter(torch.empty(dim))

    def take_groups(self, groups: int, over_ranks: bool) -> None:
        """This rank has channels of so many groups; over_ranks: all ranks have channels of the only one."""
        self.groups, self.over_ranks = groups, over_ranks

    def forward(self, x: Tensor) -> Tensor:
        parts = x.unflatten(-1, (self.groups, -1))
        ones = torch.ones(parts.shape[-1], dtype=x.dtype, device=x.device)
        mean = self.region.mean if self.over_ranks else itself
        return rms_normalise_wide(parts, self.eps, ones, mean).flatten(-2) * self.weight.to(x.dtype)
