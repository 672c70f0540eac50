"""Tokens sorted by the experts that they chose, and back.

Shapes: N tokens, D model width, E experts, k experts a token, P = N*k (token, choice) pairs, R dispatched rows.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llm.kernels.grouped import Padding


@dataclass(frozen=True)
class Dispatch:
    """Where each (token, choice) pair sits when pairs are sorted by expert. Pair p belongs to token p // k."""

    row_of_pair: Tensor
    """(P,) int64; of a pair that has no row, 0."""
    pair_of_row: Tensor
    """(R,) int64; padding rows repeat pair 0 and are never read back."""
    padding: Tensor
    """Indices of the padding rows."""
    counts: Tensor
    """(E,) int64 pairs of each expert."""
    sizes: Tensor
    """(E,) int64 rows of each expert: its pairs and padding."""
    top_k: int
    rejected_P: Tensor | None = None
    """bool: pairs that have no row, and whose result is 0."""

    @classmethod
    def sort(
        cls, expert_Nk: Tensor, n_experts: int, padding: Padding, rejected_Nk: Tensor | None = None
    ) -> "Dispatch":
        """Stable sort of the pairs by expert, but for those that are rejected."""
        if rejected_Nk is not None:
            return cls._of_admitted(expert_Nk, n_experts, padding, rejected_Nk)
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

    @classmethod
    def _of_admitted(cls, expert_Nk: Tensor, n_experts: int, padding: Padding, rejected_Nk: Tensor) -> "Dispatch":
        """As if the others were all there are."""
        rejected_P, k = rejected_Nk.flatten(), expert_Nk.shape[1]
        pair_of_admitted = (~rejected_P).nonzero().flatten()  # the host waits for the device, as it must know how many
        among = cls.sort(expert_Nk.flatten()[pair_of_admitted, None], n_experts, padding)
        row_of_pair = torch.zeros_like(rejected_P, dtype=torch.int64)
        row_of_pair[pair_of_admitted] = among.row_of_pair
        pair_of_row = pair_of_admitted[among.pair_of_row]
        return cls(row_of_pair, pair_of_row, among.padding, among.counts, among.sizes, k, rejected_P)

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
        if self.rejected_P is not None:
            y_PD.masked_fill_(self.rejected_P.unsqueeze(-1), 0)
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
