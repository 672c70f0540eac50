"""A mixer as a user adds one: an exponential moving average of each channel, with a decay that is learned.

    model: {layer_pattern: [attn, average]}
    extensions: [docs/extend/moving_average.py]

It has a parameter of its own that tensor parallelism cuts, a float32 state, begins anew with each document, and
remembers its state when rows are continued.

Shapes: B rows, T tokens, D model width, C channels of this rank.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llm.args import LayerSpec, ModelArgs
from llm.args.layers import LayerItem, MixerSpec, refuse
from llm.init import Constant
from llm.layers.context import Context
from llm.layers.linear import Linear
from llm.layers.mixers import register
from llm.layers.parameter import ParamInfo, Rows, under, weights
from llm.layers.region import InRegion


@dataclass
class Remembered:
    """The averages of some rows after their last token, float32 (B, C)."""

    average_BC: Tensor

    @property
    def nbytes(self) -> int:
        return self.average_BC.nbytes

    def reorder(self, rows: Tensor) -> None:
        self.average_BC = self.average_BC.index_select(0, rows.to(self.average_BC.device))


class MovingAverage(nn.Module, InRegion):
    """out(average of in(x)), where average_t = a average_(t-1) + (1 - a) in(x)_t and a = sigmoid(rate)."""

    def __init__(self, args: ModelArgs, spec: LayerSpec) -> None:
        super().__init__()
        self.layer = spec.index
        self.rate = nn.Parameter(torch.empty(args.dim))
        self.w_in = Linear(args.dim, args.dim)
        self.w_out = Linear(args.dim, args.dim)

    @staticmethod
    def resolve(args: ModelArgs, item: LayerItem) -> MixerSpec:
        if item.flags:
            refuse(item.text, f"unknown flag :{item.flags[0]}; average has none")
        return MixerSpec(item.mixer)

    @staticmethod
    def declare(args: ModelArgs, spec: LayerSpec) -> Rows:
        dim = args.dim
        rate = ParamInfo((dim,), "bias", Constant(1.0), tensor_dim=0)
        w_in = Linear.declare(dim, dim, False, weights(args), tensor_dim=0)
        w_out = Linear.declare(dim, dim, False, weights(args, writes_residual=True), tensor_dim=1)
        return {"rate": rate, **under("w_in", w_in), **under("w_out", w_out)}

    @staticmethod
    def flops(args: ModelArgs, spec: LayerSpec, seq_len: int) -> int:
        return 12 * args.dim

    def forward(self, x_BTD: Tensor, ctx: Context) -> Tensor:
        h = self.w_in(self.region.enter(x_BTD, ctx.cut_sequence))
        h_BTC = h.unflatten(0, ctx.shape) if h.dim() == 2 else h
        y_BTC = self.average(h_BTC.float(), ctx).to(h.dtype)
        return self.region.leave(self.w_out(y_BTC), ctx.cut_sequence)

    def average(self, h_BTC: Tensor, ctx: Context) -> Tensor:
        """Token after token: a formula to read, not to run fast."""
        a_C, average_BC = self.rate.float().sigmoid(), torch.zeros_like(h_BTC[:, 0])
        remembered = None
        if ctx.states is not None:  # then each row is one document, and goes on where it was
            remembered = ctx.states.state(self.layer, lambda: Remembered(average_BC))
            average_BC = remembered.average_BC
        found = []
        for t in range(h_BTC.shape[1]):
            before_BC = average_BC
            if remembered is None and ctx.starts_BT is not None:
                before_BC = before_BC.masked_fill(ctx.starts_BT[:, t, None], 0)
            average_BC = a_C * before_BC + (1 - a_C) * h_BTC[:, t]
            if ctx.valid_BT is not None:  # padding changes nothing
                average_BC = torch.where(ctx.valid_BT[:, t, None], average_BC, before_BC)
            found.append(average_BC)
        if remembered is not None:
            remembered.average_BC = average_BC
        return torch.stack(found, dim=1)


register("average", MovingAverage)
