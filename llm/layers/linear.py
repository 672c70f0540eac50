"""The product of activations with a weight, outside of MoE experts and the output matrix.

A weight is read in the forward of its own module only, so that whatever gathers weights around a module's call
(ZeRO-3) finds every use. Where weights are cut over ranks, a module holds its part and computes with that; what must
be summed or joined then is said in llm/layers/region.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.args.lora import LoraArgs
from llm.init import Draw
from llm.kernels.int8 import Int8Weight, int8_linear
from llm.layers.lora import Adapted, adapter_rows
from llm.layers.parameter import ZEROS, ParamInfo, Rows


class Linear(Adapted):
    """y = x W^T + b with W (n_out, n_in), b (n_out,) and an adapter only if asked for. They are left unset; llm/init.py
    fills them.
    """

    rows: slice | None = None
    """The outputs that this rank computes, where it holds the whole weight all the same."""
    adds_bias: bool = True
    """Whether this rank adds the bias, where the results of several ranks are summed: one of them does."""

    def __init__(self, n_in: int, n_out: int, bias: bool = False, lora: LoraArgs | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.bias = nn.Parameter(torch.empty(n_out)) if bias else None
        self.add_adapter(lora, n_in, n_out)

    @staticmethod
    def declare(
        n_in: int,
        n_out: int,
        bias: bool,
        init: Draw,
        tensor_dim: int | None,
        grain: int | None = None,
        lora: LoraArgs | None = None,
    ) -> Rows:
        """tensor_dim: 0 where tensor parallelism cuts the outputs, 1 where the inputs, None where neither; `grain`
        parts of it stay whole."""
        weight = ParamInfo((n_out, n_in), "matrix", init, tensor_dim, grain, decay=True, may_be_int8=True)
        rows = {"weight": weight}
        if bias:
            cut = (tensor_dim, grain) if tensor_dim == 0 else (None, None)
            rows["bias"] = ParamInfo((n_out,), "bias", ZEROS, *cut)
        return rows | adapter_rows(weight, lora)

    def forward(self, x: Tensor, keys_N: Tensor | None = None) -> Tensor:
        """keys_N: see `Context.keys_N`."""
        weight: Tensor | Int8Weight = self.weight
        bias: Tensor | None = self.bias
        if self.rows is not None:
            weight, bias = weight[self.rows], None if bias is None else bias[self.rows]
        if bias is not None and not self.adds_bias:
            bias = bias * 0  # so that it has a gradient here too, to be summed with the others'
        y = int8_linear(x, weight, bias) if isinstance(weight, Int8Weight) else F.linear(x, weight, bias)
        if self.lora_b is None:
            return y
        return y + F.linear(self.narrowed(x, keys_N), self.lora_b if self.rows is None else self.lora_b[self.rows])
