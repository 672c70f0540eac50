"""Dense feed-forwards: gated (Shazeer 2020, arXiv:2002.05202), w2(act(w1 x) * w3 x), or plain, w2(act(w1 x))."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from llm.args import Activation, ModelArgs
from llm.layers.linear import Linear
from llm.layers.region import WHOLE, Region

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


class FeedForward(nn.Module):
    """Dense feed-forward of width `hidden`."""

    region: Region = WHOLE

    def __init__(
        self, dim: int, hidden: int, act: Activation = "silu", gated: bool = True, bias: bool = False
    ) -> None:
        super().__init__()
        self.act = ACTIVATIONS[act]
        self.w1 = Linear(dim, hidden, bias)
        self.w2 = Linear(hidden, dim, bias)
        self.w3 = Linear(dim, hidden, bias) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        return self.region.leave(self.inside(self.region.enter(x)))

    def inside(self, x: Tensor) -> Tensor:
        """The work between the edges of the region, for a layer that has entered it."""
        y = self.act(self.w1(x))
        return self.w2(y if self.w3 is None else y * self.w3(x))


def build_feed_forward(args: ModelArgs) -> FeedForward:
    """The dense feed-forward of a model."""
    return FeedForward(args.dim, args.ffn_width(), args.act, args.gated, args.ffn_bias)
