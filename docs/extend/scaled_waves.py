"""Parts of layers as a user adds them: an activation, and a kind of position with a parameter.

    model: {pos: scaled_waves, act: squared_relu, gated: false}
    extensions: [docs/extend/scaled_waves.py]

squared_relu is max(0, x)^2 (So et al. 2021, arXiv:2109.08668); scaled_waves are sinusoidal positions times a number
that is learned (Li et al. 2019, arXiv:1809.08895).

Shapes: D model width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.args import ModelArgs
from llm.init import Constant
from llm.layers import activations, positions
from llm.layers.parameter import ParamInfo, Rows


def squared_relu(x: Tensor) -> Tensor:
    """Of each element alone."""
    return F.relu(x).square()


class ScaledWaves(nn.Module):
    """Vectors (..., D) of positions (...)."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.dim = args.dim
        self.weight = nn.Parameter(torch.empty(1))

    @staticmethod
    def declare(args: ModelArgs) -> Rows:
        """Every tensor-parallel rank has it, outside of the regions whose weights are cut; no matrix product meets it.
        """
        return {"weight": ParamInfo((1,), "norm", Constant(1.0), in_region=False, active=0.0)}

    def forward(self, where: Tensor) -> Tensor:
        return positions.sinusoids(where, self.dim) * self.weight


activations.register("squared_relu", squared_relu)
positions.register("scaled_waves", positions.PositionKind(build=ScaledWaves, declare=ScaledWaves.declare))
