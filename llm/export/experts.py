"""Mixtures of experts without sorting: every expert sees every token, which counts with the weight 0 where it was not
chosen. The same result by more products: of a graph, tokens that are sent by their contents would be another in every
call.

Shapes: N tokens, D model width, E experts, k experts a token.
"""

import torch
from torch import Tensor, nn

from llm.layers.activations import ACTIVATIONS
from llm.layers.context import Context
from llm.layers.moe import MoE, route


class DenseMoE(nn.Module):
    """What an MoE layer computes outside of training, by its router, experts and shared expert."""

    def __init__(self, sparse: MoE) -> None:
        super().__init__()
        self.moe = sparse.moe
        self.router, self.experts, self.shared_expert = sparse.router, sparse.experts, sparse.shared_expert

    def forward(self, x: Tensor, ctx: Context) -> tuple[Tensor, None]:
        """The second result is for statistics, of which a graph has none."""
        x_ND = x.flatten(0, -2)
        logits_NE = self.router(x_ND)
        chosen_Nk, expert_Nk = route(logits_NE, self.moe)
        weight_NE = torch.zeros_like(logits_NE).scatter(1, expert_Nk, chosen_Nk)
        weight_EN1 = weight_NE.to(x.dtype).t().unsqueeze(-1)
        x_END = x_ND.unsqueeze(0)
        if self.moe.apply == "input":
            y_ND = self._of_each(x_END * weight_EN1).sum(0)
        else:
            y_ND = (self._of_each(x_END.expand(self.moe.n_experts, -1, -1)) * weight_EN1).sum(0)
        y = y_ND.view(x.shape)
        return y if self.shared_expert is None else y + self.shared_expert.inside(x, ctx), None

    def _of_each(self, x_END: Tensor) -> Tensor:
        """Every expert's result of its tokens, (E, N, D)."""
        experts = self.experts

        def product(x: Tensor, weight: Tensor, bias_En: Tensor | None) -> Tensor:
            y = torch.bmm(x, weight)
            return y if bias_En is None else y + bias_En.unsqueeze(1)

        hidden = ACTIVATIONS[experts.kind.act](product(x_END, experts.w1, experts.b1))
        if experts.w3 is not None:
            hidden = hidden * product(x_END, experts.w3, experts.b3)
        return product(hidden, experts.w2, experts.b2)


def with_dense_experts(module: nn.Module) -> None:
    """Put DenseMoE in the place of every MoE within."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, MoE):
                setattr(parent, name, DenseMoE(child))
