"""A causal convolution of few taps of each channel by itself, followed by SiLU, as state-space mixers have before their
recurrence.

It is a sum of shifted copies: a library's convolution of channels one by one wants them transposed, and is slower on a
CPU. The backward makes the sum before SiLU again, which costs less than to keep it.

Shapes: B rows, T tokens, C channels, K taps.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def short_conv(
    x_BTC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None,
    documents_BT: Tensor | None = None,
    history_BKC: Tensor | None = None,
) -> Tensor:
    """silu(bias + sum over j of weight_j x_(t - K + 1 + j)), (B, T, C).

    documents: int64, of each token; taps reach none of another document; None = a row is one. history: the K - 1 tokens
    before the first; None = there are none, which count as 0.
    """
    taps = weight_CK.shape[1]
    if history_BKC is None:
        x_BLC = F.pad(x_BTC, (0, 0, taps - 1, 0))
    else:
        x_BLC = torch.cat([history_BKC.to(x_BTC.dtype), x_BTC], dim=1)
    seen = None
    if documents_BT is not None:
        before = F.pad(documents_BT, (taps - 1, 0), value=-1)
        length = documents_BT.shape[1]
        seen = torch.stack([before[:, j : j + length] == documents_BT for j in range(taps - 1)])[..., None]
    y: Tensor = _ShortConv.apply(x_BLC, weight_CK, bias_C, seen)
    return y


class _ShortConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, seen: Tensor | None) -> Tensor:
        """x (B, T + K - 1, C); seen (K - 1, B, T, 1): whether the taps before the last reach the token's document."""
        ctx.save_for_backward(x, weight, bias, seen)
        return F.silu(_sum(x, weight, bias, seen), inplace=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        x, weight, bias, seen = ctx.saved_tensors
        of_sum = torch.ops.aten.silu_backward(grad, _sum(x, weight, bias, seen))
        taps, length = weight.shape[1], grad.shape[1]
        of_x, of_weight = torch.zeros_like(x), torch.empty_like(weight)
        for j in range(taps):
            part = of_sum if seen is None or j == taps - 1 else of_sum * seen[j]
            of_x[:, j : j + length].addcmul_(part, weight[:, j])
            of_weight[:, j] = (part * x[:, j : j + length]).sum((0, 1))
        return of_x, of_weight, None if bias is None else of_sum.sum((0, 1)), None


def _sum(x: Tensor, weight: Tensor, bias: Tensor | None, seen: Tensor | None) -> Tensor:
    taps = weight.shape[1]
    length = x.shape[1] - taps + 1
    total = x[:, taps - 1 :] * weight[:, -1]
    if bias is not None:
        total += bias
    for j in range(taps - 1):
        part = x[:, j : j + length]
        total.addcmul_(part if seen is None else part * seen[j], weight[:, j])
    return total
