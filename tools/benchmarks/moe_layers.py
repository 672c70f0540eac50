"""Who is compared in a mixture-of-experts layer: this project's, and those of transformers with every way in which they
evaluate experts.

All hold the same weights and see the same input, and each makes a forward and a backward to the input and all weights.

Shapes: N tokens, D model width, E experts, F expert width, k experts a token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llm.args import MoEArgs
from llm.layers.context import Context
from llm.layers.moe import MoE
from tools.benchmarks.contestants import DTYPES, SEED

Family = Literal["llama4", "mixtral"]
FAMILIES: dict[Family, dict[str, Any]] = {
    "llama4": {"top_k": 1, "score": "sigmoid", "apply": "input", "shared": True},
    "mixtral": {"top_k": 2, "score": "softmax", "renorm": True, "apply": "output", "shared": False},
}
"""Keys of MoEArgs."""
HIGHEST_LOGIT = 2.0


@dataclass(frozen=True)
class LayerShape:
    """One layer and its input."""

    family: Family
    n_experts: int
    n_tokens: int = 4096
    dim: int = 256
    hidden: int = 512

    @property
    def moe(self) -> MoEArgs:
        return MoEArgs(n_experts=self.n_experts, **FAMILIES[self.family])

    @property
    def n_pairs(self) -> int:
        """(token, choice) pairs."""
        return self.n_tokens * self.moe.top_k


@dataclass(frozen=True)
class Batch:
    """An input, and the gradient of the output for it."""

    x_1ND: Tensor
    upstream_1ND: Tensor


@dataclass(frozen=True)
class Problem:
    """Weights under this project's names, and batches. Always the same of a shape."""

    weights: dict[str, Tensor]
    batches: list[Batch]

    @classmethod
    def make(cls, shape: LayerShape, precision: str, n_batches: int) -> "Problem":
        """Raises ValueError with more experts than dimensions.

        A token's router logits are evenly spaced numbers in random order, so every expert is as likely as any, as at
        the start of a training, and no rounding changes a choice: contestants whose router rounds differently still do
        the same work.
        """
        n_experts, dim, hidden = shape.n_experts, shape.dim, shape.hidden
        if n_experts > dim:
            raise ValueError(f"{n_experts} experts have no orthogonal router rows of width {dim}")
        generator, dtype = torch.Generator().manual_seed(SEED), DTYPES[precision]

        def weight(*size: int) -> Tensor:
            """Of variance 1 / n_in, n_in the last but one dimension."""
            return torch.randn(*size, generator=generator) * size[-2] ** -0.5

        router_ED = torch.linalg.qr(weight(dim, n_experts)).Q.t().contiguous()
        weights = {
            "router.weight": router_ED,
            "experts.w1": weight(n_experts, dim, hidden),
            "experts.w3": weight(n_experts, dim, hidden),
            "experts.w2": weight(n_experts, hidden, dim),
        }
        if shape.moe.shared:
            weights |= {f"shared_expert.w{i}.weight": weight(dim, hidden).t().contiguous() for i in (1, 3)}
            weights["shared_expert.w2.weight"] = weight(hidden, dim).t().contiguous()

        def batch() -> Batch:
            order_NE = torch.rand(shape.n_tokens, n_experts, generator=generator).argsort(-1)
            logits_NE = torch.linspace(-HIGHEST_LOGIT, HIGHEST_LOGIT, n_experts)[order_NE]
            x_ND = torch.randn(shape.n_tokens, dim, generator=generator)
            x_ND += (logits_NE - x_ND @ router_ED.t()) @ router_ED
            upstream_ND = torch.randn(shape.n_tokens, dim, generator=generator)
            return Batch(x_ND.unsqueeze(0).to(dtype), upstream_ND.unsqueeze(0).to(dtype))

        return cls({name: w.to(dtype) for name, w in weights.items()}, [batch() for _ in range(n_batches)])


@dataclass(frozen=True)
class Layer:
    """One contestant: its module, and how its tensors are called here."""

    forward: Callable[[Tensor], Tensor]
    """(1, N, D) to as many numbers."""
    parameters: dict[str, nn.Parameter]
    """Under its own names."""
    ours: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    """Its gradients under this project's names and in its layout."""

    def run(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The output and the gradients of `x` and, under the contestant's own names, of the weights."""
        x = batch.x_1ND.detach().requires_grad_()
        y = self.forward(x)
        names, tensors = ["x", *self.parameters], [x, *self.parameters.values()]
        gradients = torch.autograd.grad(y, tensors, batch.upstream_1ND.view_as(y))
        return y.detach(), dict(zip(names, gradients, strict=True))

    def results(self, batch: Batch) -> dict[str, Tensor]:
        """Output and gradients, named as this project does."""
        y, gradients = self.run(batch)
        return {"output": y.view_as(batch.x_1ND), "x": gradients.pop("x"), **self.ours(gradients)}


Build = Callable[[LayerShape, dict[str, Tensor]], Layer]


def our_layer(shape: LayerShape, weights: dict[str, Tensor]) -> Layer:
    """This project's layer as a model calls it: with its losses' sums and counts."""
    layer = MoE(shape.dim, shape.hidden, shape.moe).to(weights["router.weight"].dtype)
    layer.load_state_dict(weights)
    ctx = Context((1, shape.n_tokens))
    return Layer(lambda x: layer(x, ctx)[0], dict(layer.named_parameters()), lambda gradients: gradients)


def llama4_layer(shape: LayerShape, weights: dict[str, Tensor]) -> Layer:
    """transformers' Llama4TextMoe, which has one way only: every expert on every token, in one batched product."""
    from transformers.models.llama4 import modeling_llama4

    config = modeling_llama4.Llama4TextConfig(
        hidden_size=shape.dim,
        intermediate_size=shape.hidden,
        num_local_experts=shape.n_experts,
        num_experts_per_tok=shape.moe.top_k,
    )
    state = {
        "router.weight": weights["router.weight"],
        "experts.gate_up_proj": torch.cat([weights["experts.w1"], weights["experts.w3"]], dim=2),
        "experts.down_proj": weights["experts.w2"],
    } | {theirs: weights[ours] for ours, theirs in SHARED.items()}
    layer = modeling_llama4.Llama4TextMoe(config).to(weights["router.weight"].dtype)
    layer.load_state_dict(state)

    def ours(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        w1, w3 = gradients["experts.gate_up_proj"].chunk(2, dim=2)
        experts = {"experts.w1": w1, "experts.w3": w3, "experts.w2": gradients["experts.down_proj"]}
        shared = {ours: gradients[theirs] for ours, theirs in SHARED.items()}
        return {"router.weight": gradients["router.weight"], **experts, **shared}

    return Layer(lambda x: layer(x)[0], dict(layer.named_parameters()), ours)


SHARED = {
    "shared_expert.w1.weight": "shared_expert.gate_proj.weight",
    "shared_expert.w3.weight": "shared_expert.up_proj.weight",
    "shared_expert.w2.weight": "shared_expert.down_proj.weight",
}


def mixtral_layer(shape: LayerShape, weights: dict[str, Tensor], implementation: str) -> Layer:
    """transformers' MixtralSparseMoeBlock with one `experts_implementation`."""
    from transformers.models.mixtral import modeling_mixtral

    config = modeling_mixtral.MixtralConfig(  # type: ignore[call-arg]
        hidden_size=shape.dim,
        intermediate_size=shape.hidden,
        num_local_experts=shape.n_experts,
        num_experts_per_tok=shape.moe.top_k,
        experts_implementation=implementation,
    )
    state = {
        "gate.weight": weights["router.weight"],
        "experts.gate_up_proj": torch.cat([weights["experts.w1"], weights["experts.w3"]], dim=2).mT.contiguous(),
        "experts.down_proj": weights["experts.w2"].mT.contiguous(),
    }
    layer = modeling_mixtral.MixtralSparseMoeBlock(config).to(weights["router.weight"].dtype)
    layer.load_state_dict(state)

    def ours(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        w1, w3 = gradients["experts.gate_up_proj"].mT.chunk(2, dim=2)
        experts = {"experts.w1": w1, "experts.w3": w3, "experts.w2": gradients["experts.down_proj"].mT}
        return {"router.weight": gradients["gate.weight"], **experts}

    return Layer(layer, dict(layer.named_parameters()), ours)


def mixtral_implementations() -> list[str]:
    """Every name that transformers takes for `experts_implementation`."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return ["eager", *sorted(ALL_EXPERTS_FUNCTIONS.keys())]


def peers(family: Family) -> dict[str, Build]:
    """transformers' ways to compute a layer of the family, by name."""
    if family == "llama4":
        return {"Llama4TextMoe": llama4_layer}

    def build(implementation: str) -> Build:
        return lambda shape, weights: mixtral_layer(shape, weights, implementation)

    return {f"Mixtral {name}": build(name) for name in mixtral_implementations()}
