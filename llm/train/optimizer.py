"""The optimizer that a config asks for, over the model's parameters in groups by their rows in llm/parameters.py."""

from typing import Any

import torch

from llm.model import LLM
from llm.parallel.engine.deepspeed_private import absent_expert_group, expert_group, filler, is_copy
from llm.parallel.muon import Muon
from llm.parameters import ParameterTable
from llm.train.config import OptimConfig

MUON_KINDS = ("matrix", "expert")
"""Matrices inside the blocks. Embedding, head and router are AdamW's: their rows, one per token or expert, are not
mixed by a change of basis."""


def parameter_groups(
    model: LLM, optim: OptimConfig, table: ParameterTable | None = None
) -> list[dict[str, Any]]:
    """Parameters that train and share weight decay, learning rate, algorithm and ranks; `lr_factor` times the
    schedule's learning rate is theirs. table: where some are frozen; by default all train.
    """
    groups: dict[tuple[Any, ...], list[torch.nn.Parameter]] = {}
    held = {name: parameter for name, parameter in model.named_parameters() if not is_copy(parameter)}
    for name, row in (table or ParameterTable.of(model.args)).items():  # so that every stage has the same groups
        if not row.trainable:
            continue
        muon = optim.name == "muon" and row.kind in MUON_KINDS
        factor = optim.lr_factors.get(row.kind, 1.0)
        if muon and optim.muon_lr is not None:
            factor *= optim.muon_lr / optim.lr
        decay = optim.weight_decay if row.decay else 0.0
        parameter = held.get(name)
        if parameter is not None:
            experts = expert_group(parameter)
        else:
            experts = absent_expert_group(model) if row.expert_dim is not None else {}
        key = (decay, factor, muon, *experts.items())
        members = groups.setdefault(key, [])
        if parameter is not None:
            members.append(parameter)
    return [
        {"params": members, "weight_decay": decay, "lr_factor": factor, "muon": muon, **dict(of_experts)}
        for (decay, factor, muon, *of_experts), members in groups.items()
    ]


class PartialAdamW(torch.optim.AdamW):
    """AdamW that leaves groups with `lr_factor` 0 alone, and keeps no moments of them."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of the other groups."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if group["lr_factor"]]
        try:
            if self.param_groups:
                super().step()
        finally:
            self.param_groups = groups


def zero_gradients(model: LLM, optim: OptimConfig, table: ParameterTable) -> None:
    """Make the gradients of parameters whose kind has the learning-rate factor 0 zero before anything sees them: no
    norm, clipping or check counts them. They are still computed, and their memory stays.
    """
    for name, parameter in model.named_parameters():  # copies of tied weights too
        if parameter.requires_grad and optim.lr_factors.get(table[name].kind, 1.0) == 0:
            parameter.register_hook(torch.zeros_like)


def make_optimizer(
    model: LLM, optim: OptimConfig, table: ParameterTable | None = None
) -> torch.optim.Optimizer:
    """Fused AdamW, plain SGD, or Muon with AdamW, over the groups above, none of which is empty: DeepSpeed takes a norm
    of each group, over all stages together. table: where some parameters are frozen; by default all train.
    """
    table = table or ParameterTable.of(model.args)
    zero_gradients(model, optim, table)
    groups = parameter_groups(model, optim, table)
    like = next(model.parameters())
    for group in groups:
        if not group["params"]:  # this stage of a pipeline has none of them
            group["params"] = [filler(group, like)]
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr)
    if optim.name == "muon":
        return Muon(groups, lr=optim.lr, momentum=optim.muon_momentum, betas=optim.betas, eps=optim.eps, fused=True)
    adamw = torch.optim.AdamW if all(group["lr_factor"] for group in groups) else PartialAdamW
    return adamw(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
