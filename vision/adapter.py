"""From the encoder's patches to vectors of the text model: neighbouring patches become one vector (pixel shuffle),
which a feed-forward of two layers and then the projection bring to the text model's width.

Shapes: n tiles, G patches a side, s patches of a vector's side, C width of the encoder, O of the adapter's output, N
vectors, D width of the text model.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from llm.args import VisionArgs
from llm.args.lora import LoraArgs, adapter
from llm.boxes import share_of
from llm.init import Normal
from llm.layers.linear import Linear
from llm.layers.parameter import Rows, under
from llm.layers.region import InRegion


def shuffled(patches: Tensor, side: int) -> Tensor:
    """(n, G^2, C) -> (n, (G / s)^2, s^2 C), row by row: the vectors of each s x s patches, row by row, side by side."""
    n, n_patches, width = patches.shape
    rows = round(n_patches**0.5) // side
    cut = patches.reshape(n, rows, side, rows, side, width)
    return cut.permute(0, 1, 3, 2, 4, 5).reshape(n, rows**2, side**2 * width)


class Adapter(nn.Module, InRegion):
    """gelu(fc2(gelu(fc1 x))) of vectors that are several patches side by side."""

    def __init__(self, vision: VisionArgs, lora: LoraArgs | None) -> None:
        super().__init__()
        self.fc1 = Linear(vision.shuffled_side**2 * vision.dim, vision.output_dim, lora=adapter(lora, "fc1"))
        self.fc2 = Linear(vision.output_dim, vision.output_dim, lora=adapter(lora, "fc2"))

    @staticmethod
    def declare(vision: VisionArgs, init: Normal, lora: LoraArgs | None) -> Rows:
        """What the parameters are: see llm/layers/parameter.py. The width between the two is cut."""
        n_in, width = vision.shuffled_side**2 * vision.dim, vision.output_dim
        up = Linear.declare(n_in, width, False, init, tensor_dim=0, lora=adapter(lora, "fc1"))
        down = Linear.declare(width, width, False, init, tensor_dim=1, lora=adapter(lora, "fc2"))
        return under("fc1", up) | under("fc2", down)

    def forward(self, x: Tensor, keys_N: Tensor | None = None) -> Tensor:
        """Of (..., s^2 C), (..., O). keys_N: see `Context.keys_N`."""
        x = self.region.enter(x, False)
        y = self.fc2(F.gelu(self.fc1(x, keys_N)), keys_N)
        return F.gelu(self.region.leave(y, False))


class Projection(Linear, InRegion):
    """A linear map whose inputs, which every rank has, are cut: its result is this rank's term of a sum over the ranks,
    as are the vectors of a token table that is cut."""

    def __init__(self, n_in: int, n_out: int, lora: LoraArgs | None = None) -> None:
        super().__init__(n_in, n_out, lora=lora)
        self.n_in = n_in
        self.columns = slice(0, n_in)
        """The inputs of which this rank has the weights."""

    @staticmethod
    def declare_onto(n_in: int, n_out: int, lora: LoraArgs | None = None) -> Rows:
        """What the parameters are: see llm/layers/parameter.py. The inputs are cut."""
        return Linear.declare(n_in, n_out, False, Normal(1 / math.sqrt(n_in)), tensor_dim=1, lora=lora)

    def take_share(self, rank: int, ranks: int) -> None:
        self.columns = slice(*share_of(self.n_in, rank, ranks))

    def forward(self, x_NO: Tensor, keys_N: Tensor | None = None) -> Tensor:
        return super().forward(self.region.enter(x_NO, False)[..., self.columns], keys_N)
