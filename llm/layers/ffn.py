"""Dense feed-forwards: gated (Shazeer 2020, arXiv:2002.05202), w2(act(w1 x) * w3 x), or plain, w2(act(w1 x))."""

import torch
from torch import Tensor, nn

from llm.args import LayerSpec, LoraArgs, ModelArgs
from llm.args.lora import adapter
from llm.layers.activations import ACTIVATIONS
from llm.layers.context import Context
from llm.layers.dropout import Dropout, dropout_at
from llm.layers.linear import Linear
from llm.layers.parameter import Rows, under, weights
from llm.layers.region import InRegion


class FeedForward(nn.Module, InRegion):
    """Dense feed-forward of width `hidden`."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        act: str = "silu",
        gated: bool = True,
        bias: bool = False,
        lora: LoraArgs | None = None,
        dropout: Dropout | None = None,
        scales: tuple[float, float] | None = None,
    ) -> None:
        """dropout: of its hidden units. scales: factors on what the activation is taken of, and on what comes out."""
        super().__init__()
        self.dropout, self.scales = dropout, scales
        self.act = ACTIVATIONS[act]
        self.w1 = Linear(dim, hidden, bias, adapter(lora, "w1"))
        self.w2 = Linear(hidden, dim, bias, adapter(lora, "w2"))
        self.w3 = Linear(dim, hidden, bias, adapter(lora, "w3")) if gated else None

    @staticmethod
    def declare(args: ModelArgs, hidden: int, gated: bool = True, bias: bool = False) -> Rows:
        """What the parameters are: see llm/layers/parameter.py. The hidden width is cut."""
        first, last = weights(args), weights(args, writes_residual=True)

        def up(name: str) -> Rows:
            lora = adapter(args.lora, name)
            return under(name, Linear.declare(args.dim, hidden, bias, first, tensor_dim=0, lora=lora))

        down = Linear.declare(hidden, args.dim, bias, last, tensor_dim=1, lora=adapter(args.lora, "w2"))
        return up("w1") | under("w2", down) | (up("w3") if gated else {})

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        inside = self.inside(self.region.enter(x, ctx.cut_sequence), ctx)
        return self.region.leave(inside, ctx.cut_sequence)

    def take_share(self, rank: int, ranks: int) -> None:
        self.w2.adds_bias = rank == 0

    def inside(self, x: Tensor, ctx: Context) -> Tensor:
        """The work between the edges of the region, for a layer that has entered it."""
        y = self.w1(x, ctx.keys_N)
        y = self.act(y if self.scales is None else y * self.scales[0])
        if self.w3 is not None:
            up = self.w3(x, ctx.keys_N)
            y = y * up if torch.is_grad_enabled() else y.mul_(up)  # no backward needs what it was
        if self.dropout is not None:
            y = self.dropout(y, ctx.keys_N)
        y = self.w2(y, ctx.keys_N)
        return y if self.scales is None else y * self.scales[1]


def feed_forward_rows(args: ModelArgs) -> Rows:
    """Of what `build_feed_forward` makes."""
    return FeedForward.declare(args, args.ffn_width(), args.gated, args.ffn_bias)


def build_feed_forward(args: ModelArgs, spec: LayerSpec) -> FeedForward:
    """The dense feed-forward of a layer."""
    dropout = dropout_at(args.ffn_dropout, "hidden", f"{spec.unit}.feed_forward")
    how = args.act, args.gated, args.ffn_bias, args.lora
    return FeedForward(args.dim, args.ffn_width(), *how, dropout, args.ffn_scales)
