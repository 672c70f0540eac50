"""Products of groups of consecutive rows, each with its own matrix: what experts compute.

Shapes: R rows, D model width, F expert width, E groups (experts).
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llm.kernels.int8 import Int8Weight, int8_grouped_matmul

FEWEST_ROWS = 16
"""An expert with any rows gets at least so many on a CPU: its GEMM picks kernels, and so bits, by the row count when
that is small (measured in float32 up to 15 rows, 10 with most shapes). A token's result is then the same bits whatever
the other tokens chose. In half precision rows come in multiples of it, as AMX has tiles of 16."""
ROWS_TOGETHER = 32
"""All experts' rows come to a multiple of this on a CPU: torch works through a tensor by vectors, and what is left at
its end, up to two vectors, by single numbers, with another exp and so with other bits."""
EVEN_LIMIT = 1.5
"""In half precision on a CPU all experts get as many rows as the busiest, unless that makes more than this many times
the rows: one batched product of 64 experts with 64 rows each takes 0.4 to 0.55 of the time of 64 products (bf16 with
AMX; the same bits). In float32 it takes 0.75 to 0.9, which the padding would eat."""


@dataclass(frozen=True)
class Padding:
    """How many rows experts get for the pairs that they have."""

    least: int = 0
    """Of an expert that has any."""
    multiple: int = 1
    even: bool = False
    """As many for each as for the busiest, within EVEN_LIMIT."""
    together: int = 1
    """A multiple of which all come to; the last one gets what is missing."""

    @classmethod
    def of(cls, x_ND: Tensor) -> "Padding":
        """As suits products with `x_ND` where it lies."""
        if x_ND.device.type != "cpu":
            return cls()
        if x_ND.dtype.itemsize == 2:
            return cls(multiple=FEWEST_ROWS, even=True)
        return cls(least=FEWEST_ROWS, together=ROWS_TOGETHER)

    def sizes(self, counts_E: Tensor) -> Tensor:
        """Rows of each expert; the counts themselves where nothing is padded."""
        if self == Padding():
            return counts_E
        least_E = torch.where(counts_E > 0, counts_E.clamp(min=self.least), 0)
        sizes_E = (least_E + self.multiple - 1) // self.multiple * self.multiple
        if self.even and len(sizes_E) * int(sizes_E.max()) <= EVEN_LIMIT * int(sizes_E.sum()):
            return sizes_E.max().expand_as(sizes_E)
        sizes_E[-1] += -sizes_E.sum() % self.together
        return sizes_E


Stack = Tensor | Int8Weight
"""The matrices of all groups."""


def grouped_swiglu(
    x_RD: Tensor,
    w1_EDF: Stack,
    w2_EFD: Stack,
    w3_EDF: Stack,
    sizes_E: Tensor,
    drop_hidden: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """(silu(x w1) * (x w3)) w2 of each group, the first sizes_E[0] rows of x being those of the first; (R, D).

    drop_hidden: what w2 takes of the hidden units (R, F); the products are then apart, and keep more for the backward.
    """
    on_cpu = x_RD.device.type == "cpu"
    if on_cpu and isinstance(w1_EDF, Tensor) and drop_hidden is None:
        out: Tensor = _GroupByGroup.apply(x_RD, w1_EDF, w2_EFD, w3_EDF, sizes_E.tolist())
        return out
    sizes = sizes_E.tolist() if on_cpu else sizes_E
    hidden_RF = F.silu(grouped_matmul(x_RD, w1_EDF, sizes)) * grouped_matmul(x_RD, w3_EDF, sizes)
    return grouped_matmul(hidden_RF if drop_hidden is None else drop_hidden(hidden_RF), w2_EFD, sizes)


Adapted = tuple[Stack, Tensor, Tensor]
"""A weight (E, n_in, n_out), and its adapter's A (E, n_in, r) and B (E, r, n_out)."""


def adapted_swiglu(
    x_RD: Tensor,
    weights: Sequence[Adapted],
    scale: float,
    sizes_E: Tensor,
    drop: Callable[[Tensor, int], Tensor] | None = None,
    drop_hidden: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """`grouped_swiglu` of w1, w2 and w3, each w + scale a b, which is never made. drop: what the adapter of the first,
    second or third (0 to 2) takes of its input. drop_hidden: what w2 and its adapter take of the hidden units.
    """
    sizes = sizes_E.tolist() if x_RD.device.type == "cpu" else sizes_E

    def product(x: Tensor, i: int) -> Tensor:
        w, a, b = weights[i]
        taken = x if drop is None else drop(x, i)
        return grouped_matmul(x, w, sizes) + grouped_matmul(grouped_matmul(taken, a, sizes) * scale, b, sizes)

    hidden_RF = F.silu(product(x_RD, 0)) * product(x_RD, 2)
    return product(hidden_RF if drop_hidden is None else drop_hidden(hidden_RF), 1)


def grouped_matmul(x_RD: Tensor, w_EDF: Stack, sizes: Tensor | list[int]) -> Tensor:
    """Multiply each group of consecutive rows by its own matrix; (R, F). Sizes are a tensor for the CUDA kernel, else a
    list."""
    if isinstance(w_EDF, Int8Weight):
        return int8_grouped_matmul(x_RD, w_EDF, sizes)
    if isinstance(sizes, list):
        return _GroupedMatmul.apply(x_RD, w_EDF, sizes)
    if x_RD.dtype == torch.bfloat16 and w_EDF.shape[1] % 8 == 0 and w_EDF.shape[2] % 8 == 0:  # rows of 16 bytes
        return torch._grouped_mm(x_RD, w_EDF, offs=sizes.cumsum(0).to(torch.int32))
    return _GroupedMatmul.apply(x_RD, w_EDF, sizes.tolist())


@torch.library.custom_op("llm::grouped_matmul", mutates_args=())
def _grouped_matmul(x_RD: Tensor, w_EDF: Tensor, sizes: list[int]) -> Tensor:
    """One operation to whoever watches operations, so that activation checkpointing can keep its result."""
    out_RF = x_RD.new_empty(x_RD.shape[0], w_EDF.shape[2])
    if in_one_product(x_RD, sizes):
        torch.bmm(x_RD.unflatten(0, (-1, sizes[0])), w_EDF, out=out_RF.unflatten(0, (-1, sizes[0])))
        return out_RF
    for x, w, out in zip(x_RD.split(sizes), w_EDF, out_RF.split(sizes), strict=True):
        torch.mm(x, w, out=out)
    return out_RF


def in_one_product(x_RD: Tensor, sizes: list[int]) -> bool:
    """Whether a batched product of all groups is faster than one of each (EVEN_LIMIT says when)."""
    return x_RD.dtype.itemsize == 2 and sizes[0] > 0 and len(set(sizes)) == 1


class _GroupByGroup(torch.autograd.Function):
    """All experts' SwiGLU on a CPU, the same bits as by grouped_matmul.

    Unless all go in one product, the backward finishes one expert before the next, so what it makes on the way is
    small, stays near the cache and is memory that the last expert has used. Two tensors of the hidden width are kept
    for it, where autograd keeps four.
    """

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, sizes: list[int]) -> Tensor:
        gate_RF, up_RF = _grouped_matmul(x_RD, w1, sizes), _grouped_matmul(x_RD, w3, sizes)
        ctx.save_for_backward(x_RD, gate_RF, up_RF, w1, w2, w3)
        ctx.sizes = sizes
        return _grouped_matmul(F.silu(gate_RF).mul_(up_RF), w2, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, gate_RF, up_RF, *weights = ctx.saved_tensors
        trained = any(ctx.needs_input_grad[1:4])
        grad_x_RD, grad_weights = torch.empty_like(x_RD), [torch.empty_like(w) if trained else None for w in weights]
        by_row = (x_RD, gate_RF, up_RF, grad_RD.contiguous(), grad_x_RD)
        if in_one_product(x_RD, ctx.sizes):
            rows = (tensor.unflatten(0, (-1, ctx.sizes[0])) for tensor in by_row)
            _swiglu_backward(torch.bmm, *rows, *weights, *grad_weights)
        else:
            cut = (tensor.split(ctx.sizes) for tensor in by_row)
            parts = (itertools.repeat(None) if grad is None else grad for grad in grad_weights)
            for tensors in zip(*cut, *weights, *parts, strict=False):
                _swiglu_backward(torch.mm, *tensors)
        return grad_x_RD, *grad_weights, None


def _swiglu_backward(
    product: Callable[..., Tensor],
    x: Tensor, gate: Tensor, up: Tensor, grad: Tensor, grad_x: Tensor,
    w1: Tensor, w2: Tensor, w3: Tensor,
    grad_w1: Tensor | None, grad_w2: Tensor | None, grad_w3: Tensor | None,
) -> None:  # fmt: skip
    """Write the gradients of (silu(x w1) * (x w3)) w2 into the four `grad_` tensors, or where the weights do not train
    into grad_x alone; gate = x w1, up = x w3. `product` is torch.mm for an expert, torch.bmm for a stack of experts."""
    act = F.silu(gate)
    if grad_w2 is not None:
        product((act * up).mT, grad, out=grad_w2)  # of no rows, it is 0
    grad_hidden = product(grad, w2.mT)
    grad_up = act.mul_(grad_hidden)
    grad_gate = torch.ops.aten.silu_backward(grad_hidden.mul_(up), gate)
    if grad_w1 is not None and grad_w3 is not None:
        product(x.mT, grad_gate, out=grad_w1)
        product(x.mT, grad_up, out=grad_w3)
    product(grad_gate, w1.mT, out=grad_x)
    grad_x += product(grad_up, w3.mT)


class _GroupedMatmul(torch.autograd.Function):
    """A loop of products that write straight into their place, where autograd would cut and join copies."""

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, w_EDF: Tensor, sizes: list[int]) -> Tensor:
        ctx.save_for_backward(x_RD, w_EDF)
        ctx.sizes = sizes
        return _grouped_matmul(x_RD, w_EDF, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RF: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_RD, w_EDF = ctx.saved_tensors
        grads = grad_RF.contiguous().split(ctx.sizes)
        grad_x_RD = grad_w_EDF = None
        if ctx.needs_input_grad[0]:
            grad_x_RD = torch.empty_like(x_RD)
            for w, grad, grad_x in zip(w_EDF, grads, grad_x_RD.split(ctx.sizes), strict=True):
                torch.mm(grad, w.t(), out=grad_x)
        if ctx.needs_input_grad[1]:
            grad_w_EDF = torch.empty_like(w_EDF)
            for x, grad, grad_w in zip(x_RD.split(ctx.sizes), grads, grad_w_EDF, strict=True):
                torch.mm(x.t(), grad, out=grad_w)  # of no rows, it is 0
        return grad_x_RD, grad_w_EDF, None
