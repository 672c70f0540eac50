"""Tensor and sequence parallelism: what the edges of a layer's work do when its weights are cut over ranks.

Without sequence parallelism (Shoeybi et al. 2019, arXiv:1909.08053) the residual stream is whole on every rank: a
region is left by an all-reduce, and its input's gradient is all-reduced; these two mappings are fairscale's. With it
(Korthikanti et al. 2022, arXiv:2205.05198) each rank has the residual stream of its own tokens: a region is entered by
an all-gather and left by a reduce-scatter, as many bytes, and norms and residuals cost a part of the memory. Either
way linears that share an input share its one collective.

Shapes: N tokens, D model width, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from llm.boxes import share_of
from llm.kernels.graph_breaks import graph_break
from llm.layers.parameter import VISION
from llm.layers.region import Region
from llm.parallel.grid import Group
from llm.parallel.layout import Layout
from llm.parameters import ParamInfo


class TensorRegion(Region):
    """One object for all regions of a model."""

    def __init__(self, group: Group, sequence_parallel: bool) -> None:
        self.group = group
        self.sequence_parallel = sequence_parallel

    def cuts(self, n_tokens: int) -> bool:
        """Tokens that cannot be cut evenly, such as a prompt's, stay whole; a forward with gradients must not have
        such, as the norms' gradients are summed or not for good.
        """
        evenly = n_tokens % self.group.size == 0
        if self.sequence_parallel and not evenly and torch.is_grad_enabled():
            raise ValueError(
                f"{n_tokens} tokens of a micro-batch cannot be cut evenly over {self.group.size} tensor-parallel "
                f"ranks; change train.micro_batch_size or train.seq_len, or set parallel.sequence_parallel=false"
            )
        return self.sequence_parallel and evenly

    def enter(self, x: Tensor, cut: bool) -> Tensor:
        return _gather_tokens(x, self.group) if cut else _copy(x)

    def leave(self, y: Tensor, cut: bool) -> Tensor:
        return _scatter_tokens(y.flatten(0, -2), self.group) if cut else _reduce(y)

    def mean(self, x: Tensor) -> Tensor:
        return _copy(_reduce(x)) / self.group.size

    def once(self, x: Tensor) -> Tensor:
        part: Tensor = _Once.apply(x, self.group.size)
        return part

    def own(self, x: Tensor) -> Tensor:
        start, stop = share_of(len(x), self.group.rank, self.group.size)
        return x[start:stop]


@graph_break
def _copy(x: Tensor) -> Tensor:
    from fairscale.nn.model_parallel.mappings import copy_to_model_parallel_region

    return copy_to_model_parallel_region(x)


@graph_break
def _reduce(y: Tensor) -> Tensor:
    from fairscale.nn.model_parallel.mappings import reduce_from_model_parallel_region

    # it sums in place, and a product that activation checkpointing keeps must stay what it was
    return reduce_from_model_parallel_region(y.clone())


@graph_break
def _gather_tokens(x_nD: Tensor, group: Group) -> Tensor:
    out: Tensor = _GatherTokens.apply(x_nD, group)
    return out


@graph_break
def _scatter_tokens(y_ND: Tensor, group: Group) -> Tensor:
    out: Tensor = _ScatterTokens.apply(y_ND, group)
    return out


def _all_gather(x: Tensor, group: Group) -> Tensor:
    whole = x.new_empty(len(x) * group.size, *x.shape[1:])
    dist.all_gather_into_tensor(whole, x.contiguous(), group=group.handle)
    return whole


def _reduce_scatter(x: Tensor, group: Group) -> Tensor:
    part = x.new_empty(len(x) // group.size, *x.shape[1:])
    dist.reduce_scatter_tensor(part, x.contiguous(), group=group.handle)
    return part


class _GatherTokens(torch.autograd.Function):
    """Every rank's tokens; the gradient of a token is the sum over ranks, on the rank that has it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _all_gather(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter(grad, ctx.group), None


class _Once(torch.autograd.Function):
    """x as it is; of its gradient, which all ranks have, each takes an equal part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.ranks, None


class _ScatterTokens(torch.autograd.Function):
    """The sum over ranks, of this rank's tokens."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _reduce_scatter(y, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_gather(grad, ctx.group), None


class CutVocabulary:
    """This rank's rows [first, first + n) of a vocabulary of `total`, which need not divide evenly."""

    def __init__(self, group: Group, total: int) -> None:
        self.group = group
        self.total = total
        self.first = share_of(total, group.rank, group.size)[0]
        self.largest = -(-total // group.size)

    def gather(self, x: Tensor) -> Tensor:
        return _all_gather(x, self.group).view(self.group.size, *x.shape)

    def join(self, logits: Tensor) -> Tensor:
        joined: Tensor = _JoinVocabulary.apply(logits, self)
        return joined


class _JoinVocabulary(torch.autograd.Function):
    """What follows is the same on all ranks, and so is its gradient, of which each takes its own part."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, share: CutVocabulary) -> Tensor:
        ctx.share, ctx.width = share, logits.shape[-1]
        ranks = share.group.size
        widths = [stop - start for start, stop in (share_of(share.total, rank, ranks) for rank in range(ranks))]
        padded = torch.nn.functional.pad(logits, (0, max(widths) - logits.shape[-1]))
        parts = share.gather(padded)
        return torch.cat([part[..., :width] for part, width in zip(parts, widths, strict=True)], dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.narrow(-1, ctx.share.first, ctx.width), None


def is_partial(row: ParamInfo, layout: Layout) -> bool:
    """Whether tensor-parallel ranks hold the parameter alike, and each makes one term of its gradient. Tokens of the
    vision tower are never cut: outside of its regions every rank has them all.
    """
    cut = layout.sequence_parallel and row.unit != VISION and not row.alike
    return layout.tensor > 1 and row.cut(layout.tensor) is None and (row.in_region or cut)


def sum_each(parameter: Tensor, group: Group) -> None:
    """From now on a gradient of `parameter` is the sum over the group, in float32."""

    def sum_over_group(grad: Tensor) -> Tensor:
        total = grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True).contiguous()
        dist.all_reduce(total, group=group.handle)
        return total.to(grad.dtype)

    parameter.register_hook(sum_over_group)


@torch.no_grad()
def sum_together(gradients: Sequence[Tensor], group: Group) -> None:
    """Make each gradient its sum over the group, by one all-reduce in float32 (collective)."""
    flat = torch.cat([gradient.reshape(-1).float() for gradient in gradients])
    dist.all_reduce(flat, group=group.handle)
    for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(total.view_as(gradient))
