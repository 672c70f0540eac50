"""Mixtures of experts without sorting: every expert sees every token, and what it makes of those that did not choose it
counts 0 times. The same result by more products: of a graph, tokens that are sent by their contents would be another in
every call. Capacities are of training, so no expert is full here.

Shapes: N tokens, D model width, E experts, F expert width, k experts a token.
"""

import torch
from torch import Tensor, nn

from llm.layers.activations import ACTIVATIONS
from llm.layers.context import Context
from llm.layers.moe import MoE, route


class DenseMoE(nn.Module):
    """What an MoE layer computes when it is evaluated, by its router, experts and shared expert."""

    def __init__(self, sparse: MoE) -> None:
        super().__init__()
        self.moe = sparse.moe
        self.router, self.experts, self.shared_expert = sparse.router, sparse.experts, sparse.shared_expert

    def forward(self, x: Tensor, ctx: Context) -> tuple[Tensor, None]:
        """The second result is for statistics, of which a graph has none."""
        x_ND = x.flatten(0, -2)
        logits_NE = self.router(x_ND)
        found_Nk, expert_Nk = route(logits_NE, self.moe)
        weight_EN1 = _of_experts(found_Nk.to(x.dtype), expert_Nk, self.moe.n_experts)
        x_END = x_ND.unsqueeze(0)
        if self.moe.apply == "input":
            chosen_EN1 = _of_experts(torch.ones_like(found_Nk, dtype=x.dtype), expert_Nk, self.moe.n_experts)
            y_END = self._of_each(x_END * weight_EN1) * chosen_EN1  # of biases, too
        else:
            y_END = self._of_each(x_END.expand(self.moe.n_experts, -1, -1)) * weight_EN1
        y = y_END.sum(0).view(x.shape)
        return y if self.shared_expert is None else y + self.shared_expert.inside(x, ctx), None

    def _of_each(self, x_END: Tensor) -> Tensor:
        """Every expert's result of its tokens, (E, N, D)."""
        experts = self.experts
        hidden_ENF = ACTIVATIONS[experts.kind.act](_product(x_END, experts.w1, experts.b1))
        if experts.w3 is not None:
            hidden_ENF = hidden_ENF * _product(x_END, experts.w3, experts.b3)
        return _product(hidden_ENF, experts.w2, experts.b2)


def _of_experts(values_Nk: Tensor, expert_Nk: Tensor, n_experts: int) -> Tensor:
    """Values of each token's choices as those of all experts, (E, N, 1), 0 where one was not chosen."""
    found_NE = values_Nk.new_zeros(values_Nk.shape[0], n_experts).scatter(1, expert_Nk, values_Nk)
    return found_NE.t().unsqueeze(-1)


def _product(x_ENn: Tensor, weight: Tensor, bias_Em: Tensor | None) -> Tensor:
    y_ENm = torch.bmm(x_ENn, weight)
    return y_ENm if bias_Em is None else y_ENm + bias_Em.unsqueeze(1)


def with_dense_experts(module: nn.Module) -> None:
    """Put DenseMoE in the place of every MoE within."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, MoE):
                setattr(parent, name, DenseMoE(child))
