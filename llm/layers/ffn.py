"""SwiGLU feed-forward (Shazeer 2020, arXiv:2002.05202): w2(silu(w1 x) * w3 x)."""

import torch.nn.functional as F
from torch import Tensor, nn

from llm.layers.linear import Linear
from llm.layers.region import WHOLE, Region


class FeedForward(nn.Module):
    """Dense feed-forward of width `hidden`."""

    region: Region = WHOLE

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = Linear(dim, hidden)
        self.w2 = Linear(hidden, dim)
        self.w3 = Linear(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.region.leave(self.inside(self.region.enter(x)))

    def inside(self, x: Tensor) -> Tensor:
        """The work between the edges of the region, for a layer that has entered it."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))
