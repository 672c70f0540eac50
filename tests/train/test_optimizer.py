"""Parameters of a kind whose learning-rate factor is 0: no update, no moments, no part in the gradient norm."""

import pytest
import torch

from llm.args import ModelArgs
from llm.model import LLM
from llm.parameters import ParameterTable
from llm.train.config import OptimConfig
from llm.train.optimizer import make_optimizer

ARGS = ModelArgs.model_validate(
    {"dim": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "vocab_size": 20, "ffn_hidden": 24, "max_seq_len": 16,
     "moe": {"n_experts": 2, "top_k": 1, "hidden": 8, "interleave": 2}}
)  # fmt: skip
TOKENS = torch.arange(16).view(1, 16)


def trained(**optim: object) -> tuple[LLM, torch.optim.Optimizer]:
    """After two steps of the same model."""
    model = LLM(ARGS, seed=0)
    config = OptimConfig.model_validate({"lr": 1e-2, "min_lr": 0.0, **optim})
    optimizer = make_optimizer(model, config)
    for group in optimizer.param_groups:
        group["lr"] = 1e-2 * group["lr_factor"]
    if config.name == "muon":
        flats = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        muon_describe(optimizer, flats, [names[id(flat)] for flat in flats])
    for _ in range(2):
        optimizer.zero_grad()
        model(TOKENS, labels=TOKENS).loss_sum.backward()
        optimizer.step()
    return model, optimizer


def muon_describe(optimizer: torch.optim.Optimizer, flats: list[torch.Tensor], names: list[str]) -> None:
    """Notify Muon that each flat tensor is one whole parameter."""
    from llm.parallel.engine.deepspeed_private import OwnedRange

    table = ParameterTable.of(ARGS)
    boxes = table.boxes((0, 1), (0, 1))
    named = enumerate(zip(names, flats, strict=True))
    owned = [OwnedRange(name, 0, flat.numel(), i, flat, 0) for i, (name, flat) in named]
    optimizer.describe(flats, [[name] for name in names], table, boxes, owned, None)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
@pytest.mark.parametrize("kinds", [("matrix",), ("embedding", "head", "norm"), ("expert", "router")])
def test_a_factor_of_0_freezes(name: str, kinds: tuple[str, ...]) -> None:
    initial = dict(LLM(ARGS, seed=0).named_parameters())
    model, optimizer = trained(name=name, lr_factors=dict.fromkeys(kinds, 0.0))
    frozen = 0
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None
        if ParameterTable.of(ARGS)[key].kind in kinds:
            frozen += 1
            assert torch.equal(parameter, initial[key]) and not parameter.grad.any(), key
            assert not optimizer.state.get(parameter), "no moments"
        elif parameter.grad.any():
            assert not torch.equal(parameter, initial[key]), key
            assert name == "sgd" or optimizer.state[parameter], key
    assert frozen
