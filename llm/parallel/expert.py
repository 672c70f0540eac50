"""Expert parallelism: experts on several ranks, tokens sent to them and back by one all-to-all each way.

No token is dropped and none is padded on the way: ranks first exchange how many rows come.

Shapes: E experts, R rows, D model width.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from llm.parallel.grid import Group


class ExpertExchange:
    """The ranks of an expert-parallel group; rank i of it holds experts i * experts_per_rank and up."""

    def __init__(self, group: Group, n_experts: int) -> None:
        self.group = group
        self.experts_per_rank = n_experts // group.size

    def sizes(self, rows_E: Tensor) -> Tensor:
        received = torch.empty_like(rows_E)
        dist.all_to_all_single(received, rows_E.contiguous(), group=self.group.handle)
        return received.view(self.group.size, self.experts_per_rank)

    def swap(self, x_RD: Tensor, send: list[int], receive: list[int]) -> Tensor:
        swapped: Tensor = _Swap.apply(x_RD, self.group, send, receive)
        return swapped


class _Swap(torch.autograd.Function):
    """The gradient goes the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, send: list[int], receive: list[int]) -> Tensor:
        ctx.group, ctx.send, ctx.receive = group, send, receive
        return _all_to_all(x, group, send, receive)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grad, ctx.group, ctx.receive, ctx.send), None, None, None


def _all_to_all(x: Tensor, group: Group, send: list[int], receive: list[int]) -> Tensor:
    out = x.new_empty(sum(receive), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), receive, send, group=group.handle)
    return out
