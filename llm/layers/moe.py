"""Mixture of experts: a router sends each token to top_k SwiGLU experts, and a shared expert sees every token.

As in Llama 4 (github.com/meta-llama/llama-models) an expert's weight multiplies its input, or as in Mixtral
(arXiv:2401.04088) its output. Tokens are sorted by expert and each expert multiplies its own rows only; no token is
dropped and nothing is detached, so the result and all gradients equal evaluating every expert on every token with the
weights of the unchosen set to 0.

Shapes: N tokens, D model width, E experts, F expert width, k experts a token, P = N*k (token, choice) pairs, R
dispatched rows, S rows that arrive at this rank's experts, e experts of a rank, r ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llm.args import ModelArgs, MoEArgs
from llm.datatypes import RouterStats
from llm.layers.ffn import FeedForward
from llm.layers.linear import Linear
from llm.layers.opaque import opaque
from llm.layers.region import WHOLE, Exchange, Region

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


class MoE(nn.Module):
    """One MoE feed-forward layer."""

    expert_counts: Tensor
    region: Region = WHOLE
    exchange: Exchange | None = None
    """Set where the experts lie on several ranks."""

    def __init__(self, dim: int, hidden: int, moe: MoEArgs) -> None:
        super().__init__()
        self.moe = moe
        self.router = Router(dim, moe.n_experts)
        self.experts = Experts(moe.n_experts, dim, hidden)
        self.shared_expert = FeedForward(dim, hidden) if moe.shared else None
        # assignments of the whole previous step, set by the trainer; all 0 = not known yet
        self.register_buffer("expert_counts", torch.zeros(moe.n_experts, dtype=torch.int64), persistent=False)

    def forward(self, x_BTD: Tensor, valid_BT: Tensor | None = None) -> tuple[Tensor, RouterStats]:
        """`valid_BT`: false for padding, which goes to experts as the rest does but counts in no statistic; None where
        there is none."""
        x = self.region.enter(x_BTD)
        x_ND = x.flatten(0, -2)
        valid_N = None if valid_BT is None else valid_BT.flatten()
        logits_NE = self.router(x_ND)
        weight_Nk, expert_Nk = route(logits_NE, self.moe)
        y_ND, counts_E = self.routed(x_ND, weight_Nk, expert_Nk, valid_N)
        y = y_ND.view_as(x)
        if self.shared_expert is not None:
            y = y + self.shared_expert.inside(x)
        own_valid = None if valid_N is None else self.region.own(valid_N)
        return self.region.leave(y), self.statistics(self.region.own(logits_NE), counts_E, own_valid)

    @opaque
    def routed(
        self, x_ND: Tensor, weight_Nk: Tensor, expert_Nk: Tensor, valid_N: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Sum of the chosen experts' results (N, D), and how many of this rank's own valid tokens each expert got
        (E,)."""
        padding = Padding.of(x_ND) if self.exchange is None else Padding()
        dispatch = Dispatch.sort(expert_Nk, self.moe.n_experts, padding)
        weight_R1 = weight_Nk.to(x_ND.dtype).flatten()[dispatch.pair_of_row].unsqueeze(-1)
        x_RD = dispatch.scatter(x_ND)
        multiply = self.experts if self.exchange is None else self._elsewhere
        if self.moe.apply == "input":
            y_RD = multiply(x_RD * weight_R1, dispatch.sizes)
        else:
            y_RD = multiply(x_RD, dispatch.sizes) * weight_R1
        n_experts, own, counts = self.moe.n_experts, self.region.own(expert_Nk), dispatch.counts
        if valid_N is not None:  # padding counts for an expert beyond the last
            own = own.masked_fill(~self.region.own(valid_N).unsqueeze(-1), n_experts)
        if len(own) != len(expert_Nk) or valid_N is not None:
            counts = torch.bincount(own.flatten(), minlength=n_experts + 1)[:n_experts]
        return dispatch.gather(y_RD), counts

    def _elsewhere(self, x_RD: Tensor, sizes_E: Tensor) -> Tensor:
        """As self.experts, for all experts of all ranks: rows go where their expert is, and their results come back."""
        assert self.exchange is not None
        experts = self.exchange.experts_per_rank
        sizes_re = self.exchange.sizes(sizes_E)  # that arrive from each rank, in its order: by expert
        send: list[int] = sizes_E.view(-1, experts).sum(1).tolist()
        receive: list[int] = sizes_re.sum(1).tolist()
        arrived_SD = self.exchange.swap(x_RD, send, receive)
        experts_re = torch.arange(experts, device=x_RD.device).repeat(len(sizes_re))
        expert_S = experts_re.repeat_interleave(sizes_re.flatten(), output_size=sum(receive))
        here = Dispatch.sort(expert_S.unsqueeze(-1), experts, Padding.of(arrived_SD))
        y_SD = here.gather(self.experts(here.scatter(arrived_SD), here.sizes))
        return self.exchange.swap(y_SD, receive, send)

    def statistics(self, logits_NE: Tensor, counts: Tensor, valid_N: Tensor | None = None) -> RouterStats:
        """The losses' sums and the counts of this call; of valid tokens only.

        The balance loss compares each token's softmax with the previous whole step's counts, not with its own batch's:
        so it is linear in tokens, and any cut of a batch over ranks and micro-batches adds up to the same number.
        """
        zero = logits_NE.new_zeros(())
        balance = self._balance(logits_NE, valid_N) if self.moe.balance == "lag" and self.moe.aux_alpha else zero
        z = self.moe.z_alpha * _of_valid(logits_NE.logsumexp(-1).square(), valid_N).sum() if self.moe.z_alpha else zero
        return RouterStats(balance, z, counts)

    def _balance(self, logits_NE: Tensor, valid_N: Tensor | None) -> Tensor:
        n_experts, total = self.moe.n_experts, self.expert_counts.sum()
        share_E = torch.where(total > 0, self.expert_counts.double() / total.clamp(min=1), 1 / n_experts).to(
            logits_NE.dtype
        )
        return self.moe.aux_alpha * n_experts * (_of_valid(logits_NE.softmax(-1), valid_N).sum(0) @ share_E)


def _of_valid(x_N: Tensor, valid_N: Tensor | None) -> Tensor:
    """x (N, ...) with 0 for tokens that are padding."""
    if valid_N is None:
        return x_N
    return x_N.masked_fill(~valid_N.view(-1, *[1] * (x_N.dim() - 1)), 0)


class Router(Linear):
    """A Linear that works in float32 at least, whatever its weight is: rounded logits would change which experts are
    chosen."""

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.linear(x.to(wide), self.weight.to(wide))


def route(logits_NE: Tensor, moe: MoEArgs) -> tuple[Tensor, Tensor]:
    """Weights (float32) and expert indices of each token's choices, both (N, k)."""
    chosen_Nk, expert_Nk = logits_NE.topk(moe.top_k, dim=-1)
    if moe.score == "sigmoid":
        weight_Nk = chosen_Nk.sigmoid()
    else:
        weight_Nk = (chosen_Nk - logits_NE.logsumexp(-1, keepdim=True)).exp()
    if moe.renorm:
        weight_Nk = weight_Nk / weight_Nk.sum(-1, keepdim=True)
    return weight_Nk, expert_Nk


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


@dataclass(frozen=True)
class Dispatch:
    """Where each (token, choice) pair sits when pairs are sorted by expert. Pair p belongs to token p // k."""

    row_of_pair: Tensor
    """(P,) int64."""
    pair_of_row: Tensor
    """(R,) int64; padding rows repeat pair 0 and are never read back."""
    padding: Tensor
    """Indices of the padding rows."""
    counts: Tensor
    """(E,) int64 pairs of each expert."""
    sizes: Tensor
    """(E,) int64 rows of each expert: its pairs and padding."""
    top_k: int

    @classmethod
    def sort(cls, expert_Nk: Tensor, n_experts: int, padding: Padding) -> "Dispatch":
        """Stable sort of the pairs by expert."""
        expert_P = expert_Nk.flatten()
        order_P = torch.argsort(expert_P, stable=True)
        counts_E = torch.bincount(expert_P, minlength=n_experts)
        index_P = torch.arange(expert_P.numel(), device=order_P.device)
        sizes_E = padding.sizes(counts_E)
        if sizes_E is counts_E:  # nothing reads counts here, which would make the host wait for the device
            row_of_pair = torch.empty_like(order_P).scatter_(0, order_P, index_P)
            return cls(row_of_pair, order_P, order_P[:0], counts_E, counts_E, expert_Nk.shape[1])
        shift_E = (sizes_E.cumsum(0) - sizes_E) - (counts_E.cumsum(0) - counts_E)
        row_of_sorted = index_P + shift_E[expert_P[order_P]]
        pair_of_row = order_P.new_full((int(sizes_E.sum()),), -1)
        pair_of_row[row_of_sorted] = order_P
        filler = (pair_of_row < 0).nonzero().flatten()
        row_of_pair = torch.empty_like(order_P).scatter_(0, order_P, row_of_sorted)
        return cls(row_of_pair, pair_of_row.clamp_(min=0), filler, counts_E, sizes_E, expert_Nk.shape[1])

    def scatter(self, x_ND: Tensor) -> Tensor:
        """Each pair's token, at the pair's row; (R, D)."""
        return _Scatter.apply(x_ND, self)

    def gather(self, y_RD: Tensor) -> Tensor:
        """Sum over each token's choices, in the order of choice, so the same bits every time; (N, D)."""
        return _Gather.apply(y_RD, self)

    def rows_from_tokens(self, x_ND: Tensor) -> Tensor:
        return x_ND.index_select(0, self.pair_of_row // self.top_k)

    def tokens_from_rows(self, y_RD: Tensor) -> Tensor:
        y_PD = y_RD.index_select(0, self.row_of_pair)
        if self.top_k == 1:
            return y_PD
        y_NkD = y_PD.view(-1, self.top_k, y_PD.shape[-1])
        if self.top_k == 2:  # the same bits as sum, whose reduction over so short a dimension is slow on CPUs
            return y_NkD[:, 0] + y_NkD[:, 1]
        return y_NkD.sum(1)


class _Scatter(torch.autograd.Function):
    """Its gradient is the gather: no atomic additions, as an index_select's own backward would use."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, dispatch: Dispatch) -> Tensor:
        ctx.dispatch = dispatch
        return dispatch.rows_from_tokens(x_ND)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        return ctx.dispatch.tokens_from_rows(grad_RD), None


class _Gather(torch.autograd.Function):
    """Its gradient is the scatter, with nothing in the padding rows."""

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, dispatch: Dispatch) -> Tensor:
        ctx.dispatch = dispatch
        return dispatch.tokens_from_rows(y_RD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None]:
        return ctx.dispatch.rows_from_tokens(grad_ND).index_fill_(0, ctx.dispatch.padding, 0), None


class Experts(nn.Module):
    """The experts' SwiGLU weights, stacked: w1, w3 (E, D, F) and w2 (E, F, D)."""

    def __init__(self, n_experts: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(n_experts, dim, hidden))
        self.w2 = nn.Parameter(torch.empty(n_experts, hidden, dim))
        self.w3 = nn.Parameter(torch.empty(n_experts, dim, hidden))

    def forward(self, x_RD: Tensor, sizes_E: Tensor) -> Tensor:
        """x_RD holds sizes_E[0] rows of expert 0, then those of expert 1, and so on."""
        if x_RD.device.type == "cpu":
            return _ExpertByExpert.apply(x_RD, self.w1, self.w2, self.w3, sizes_E.tolist())
        hidden_RF = F.silu(grouped_matmul(x_RD, self.w1, sizes_E)) * grouped_matmul(x_RD, self.w3, sizes_E)
        return grouped_matmul(hidden_RF, self.w2, sizes_E)


def grouped_matmul(x_RD: Tensor, w_EDF: Tensor, sizes: Tensor | list[int]) -> Tensor:
    """Multiply each group of consecutive rows by its own matrix; (R, F). Sizes are a tensor for the CUDA kernel, else a
    list."""
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


class _ExpertByExpert(torch.autograd.Function):
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
        grad_x_RD, grad_weights = torch.empty_like(x_RD), [torch.empty_like(w) for w in weights]
        by_row = (x_RD, gate_RF, up_RF, grad_RD.contiguous(), grad_x_RD)
        if in_one_product(x_RD, ctx.sizes):
            rows = (tensor.unflatten(0, (-1, ctx.sizes[0])) for tensor in by_row)
            _swiglu_backward(torch.bmm, *rows, *weights, *grad_weights)
        else:
            cut = (tensor.split(ctx.sizes) for tensor in by_row)
            for tensors in zip(*cut, *weights, *grad_weights, strict=True):
                _swiglu_backward(torch.mm, *tensors)
        return grad_x_RD, *grad_weights, None


def _swiglu_backward(
    product: Callable[..., Tensor],
    x: Tensor, gate: Tensor, up: Tensor, grad: Tensor, grad_x: Tensor,
    w1: Tensor, w2: Tensor, w3: Tensor, grad_w1: Tensor, grad_w2: Tensor, grad_w3: Tensor,
) -> None:  # fmt: skip
    """Write the gradients of (silu(x w1) * (x w3)) w2 into the four `grad_` tensors; gate = x w1, up = x w3. `product`
    is torch.mm for an expert, torch.bmm for a stack of experts."""
    act = F.silu(gate)
    product((act * up).mT, grad, out=grad_w2)  # of no rows, it is 0
    grad_hidden = product(grad, w2.mT)
    grad_up = act.mul_(grad_hidden)
    grad_gate = torch.ops.aten.silu_backward(grad_hidden.mul_(up), gate)
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
    def backward(ctx: Any, grad_RF: Tensor) -> tuple[Tensor, Tensor, None]:
        x_RD, w_EDF = ctx.saved_tensors
        grad_RF = grad_RF.contiguous()
        grad_x_RD, grad_w_EDF = torch.empty_like(x_RD), torch.empty_like(w_EDF)
        groups = zip(
            x_RD.split(ctx.sizes), w_EDF, grad_RF.split(ctx.sizes), grad_x_RD.split(ctx.sizes), grad_w_EDF, strict=True
        )
        for x, w, grad, grad_x, grad_w in groups:
            torch.mm(grad, w.t(), out=grad_x)
            torch.mm(x.t(), grad, out=grad_w)  # of no rows, it is 0
        return grad_x_RD, grad_w_EDF, None


def build_moe(args: ModelArgs) -> MoE:
    """The MoE layer that `args` describes. Raises ValueError without args.moe."""
    if args.moe is None:
        raise ValueError("this layer is MoE but model.moe is not given")
    return MoE(args.dim, args.moe_width(), args.moe)
