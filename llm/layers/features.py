"""Values instead of tokens: the linear map that makes vectors of rows of numbers, and the one that makes numbers of
final hidden states. Both stand where a model of tokens has its table and its output matrix, under the same names, and
are whole on every tensor-parallel rank.

Scales that a run has learned (llm/args/values.py) lie on both sides: a model reads and says values in the units of its
data, whatever it computes with.

Shapes: B rows, T positions, F numbers of a position (model.input_dim), O outputs (model.output_dim), D model width.
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.args import ModelArgs
from llm.datatypes import TransformerInput
from llm.init import Uniform
from llm.layers.parameter import ZEROS, ParamInfo, Rows, weights
from llm.layers.region import InRegion


class FeatureEmbedding(nn.Module, InRegion):
    """Vectors of rows of numbers: a linear map from F to D with a bias, of numbers scaled as the model says."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        assert args.input_dim is not None
        self.weight = nn.Parameter(torch.empty(args.dim, args.input_dim))
        self.bias = nn.Parameter(torch.empty(args.dim))
        self.mean, self.std = args.input_mean, args.input_std

    @staticmethod
    def declare(args: ModelArgs) -> Rows:
        """It is used outside of tensor-parallel regions, on this rank's positions where these are cut. Both begin as
        torch's Linear does: norms take the length of a vector away, so without a bias that differs from 0 a single
        number would keep its sign alone.
        """
        assert args.input_dim is not None
        init = Uniform(1 / math.sqrt(args.input_dim))
        weight = ParamInfo((args.dim, args.input_dim), "embedding", init, in_region=False)
        return {"weight": weight, "bias": replace(weight, shape=weight.shape[:1], kind="bias")}

    def forward(self, features_BTF: Tensor, cut: bool) -> Tensor:
        """(B, T, D), or of this rank's positions alone, (n, D), where they are cut."""
        x = self.region.own(features_BTF.flatten(0, 1)) if cut else features_BTF
        return F.linear(scaled(x.float(), self.mean, self.std).to(self.weight.dtype), self.weight, self.bias)


class ValueOutput(nn.Module):
    """Numbers of final hidden states: a linear map from D to O with a bias."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        assert args.output_dim is not None
        self.weight = nn.Parameter(torch.empty(args.output_dim, args.dim))
        self.bias = nn.Parameter(torch.empty(args.output_dim))

    @staticmethod
    def declare(args: ModelArgs) -> Rows:
        """All ranks of a tensor-parallel group compute it alike, of hidden states that are whole."""
        assert args.output_dim is not None
        weight = ParamInfo(
            (args.output_dim, args.dim), "head", weights(args), in_region=False, alike=True, decay=True,
            beside_adapters=True,
        )  # fmt: skip
        return {"weight": weight, "bias": replace(weight, shape=weight.shape[:1], kind="bias", init=ZEROS, decay=False)}

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., O) float32, as they are learned: scaled."""
        return F.linear(hidden.to(self.weight.dtype), self.weight, self.bias).float()


def check_features(args: ModelArgs, inputs: TransformerInput) -> None:
    """ValueError where a model of values is given tokens alone, one of tokens values, or values of another shape."""
    features, expected = inputs.features, args.input_dim
    if features is None:
        if expected is not None:
            raise ValueError(
                f"model.input_dim={expected}: the model reads values, a float tensor (B, T, {expected}) or "
                f"TransformerInput.of_features; it was given tokens"
            )
        return
    if expected is None:
        raise ValueError("the model reads tokens, and has no model.input_dim; it was given values")
    if not features.is_floating_point() or features.shape != (*inputs.tokens.shape, expected):
        raise ValueError(
            f"values must be floats of shape (B, T, model.input_dim), here "
            f"{(*inputs.tokens.shape, expected)}; got {features.dtype} of shape {tuple(features.shape)}"
        )


def scaled(values: Tensor, mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> Tensor:
    """Values (..., n) as a model computes with them."""
    if mean is not None:
        values = values - values.new_tensor(mean)
    return values if std is None else values / values.new_tensor(std)


def in_units(values: Tensor, mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> Tensor:
    """Scaled values (..., n) in the units of the data."""
    if std is not None:
        values = values * values.new_tensor(std)
    return values if mean is None else values + values.new_tensor(mean)
