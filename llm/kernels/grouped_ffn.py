"""Plain or gated feed-forwards of groups of consecutive rows, with any activation and with biases: experts that are no
SwiGLU.

Shapes: R rows, D model width, F expert width, E groups (experts), n any width.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llm.kernels.grouped import grouped_matmul


def grouped_feed_forward(
    x_RD: Tensor,
    act: Callable[[Tensor], Tensor],
    weights: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    sizes_E: Tensor,
    drop_hidden: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """w2(act(w1 x + b1) * (w3 x + b3)) + b2 of each group, or without w3, w2 act(w1 x + b1) + b2; (R, D).

    weights: w1 and w3 (E, D, F), w2 (E, F, D), in the order of their names; biases likewise, (E, F) and (E, D).
    drop_hidden: what w2 takes of the hidden units.
    """
    sizes = sizes_E.tolist() if x_RD.device.type == "cpu" else sizes_E

    def product(x: Tensor, number: int) -> Tensor:
        weight, bias = weights[number], biases[number]
        assert weight is not None
        y = grouped_matmul(x.to(weight.dtype), weight, sizes)  # which autocast does not reach
        return y if bias is None else y + _OfEachRow.apply(bias, sizes_E, len(y)).to(y.dtype)

    hidden_RF = act(product(x_RD, 0))
    if weights[2] is not None:
        hidden_RF = hidden_RF * product(x_RD, 2)
    return product(hidden_RF if drop_hidden is None else drop_hidden(hidden_RF), 1)


class _OfEachRow(torch.autograd.Function):
    """Each group's vector (E, n) at each of its rows (R, n). The gradient is summed row by row, the same bits every
    time, where repeat_interleave's own would add up in any order on a GPU."""

    @staticmethod
    def forward(ctx: Any, bias_En: Tensor, sizes_E: Tensor, n_rows: int) -> Tensor:
        ctx.save_for_backward(sizes_E)
        return bias_En.repeat_interleave(sizes_E, 0, output_size=n_rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_Rn: Tensor) -> tuple[Tensor, None, None]:
        (sizes_E,) = ctx.saved_tensors
        summed = torch.segment_reduce(grad_Rn.float().contiguous(), "sum", lengths=sizes_E, axis=0)
        return summed.to(grad_Rn.dtype), None, None
