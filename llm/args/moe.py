"""Keys of mixture-of-experts layers."""

from typing import Literal

from pydantic import Field, model_validator

from llm.args.group import Group


class MoEArgs(Group):
    """Mixture-of-experts layers."""

    n_experts: int = Field(gt=0, le=1 << 16)
    """Experts in each MoE layer."""
    top_k: int = Field(1, gt=0)
    """Experts each token visits."""
    hidden: int | None = Field(None, gt=0)
    """Width of an expert and of the shared expert; unset = the rule from ffn_exp."""
    interleave: int = Field(1, gt=0)
    """Layer i is MoE when (i + 1) is a multiple of this."""
    score: Literal["sigmoid", "softmax"] = "sigmoid"
    """How router logits become weights."""
    renorm: bool = False
    """Divide the chosen weights by their sum. With top_k=1 they become 1: then only auxiliary losses train the router.
    """
    apply: Literal["input", "output"] = "input"
    """Where an expert's weight multiplies: its input (Llama 4) or its output (Mixtral, Qwen)."""
    shared: bool = True
    """Add one expert that every token visits, unweighted."""
    balance: Literal["lag", "none"] = "lag"
    """Balance loss: against the expert counts of the whole previous step, or none."""
    aux_alpha: float = Field(0.0, ge=0)
    """Weight of the balance loss."""
    z_alpha: float = Field(0.0, ge=0)
    """Weight of the router z-loss, the mean of logsumexp squared."""
    dense_layers: tuple[int, ...] = ()
    """Layers that stay dense whatever interleave says (0-based)."""

    @model_validator(mode="after")
    def _check(self) -> "MoEArgs":
        if self.top_k > self.n_experts:
            raise ValueError(f"model.moe.top_k={self.top_k} exceeds model.moe.n_experts={self.n_experts}")
        if self.balance == "none" and self.aux_alpha:
            raise ValueError(f"model.moe.aux_alpha={self.aux_alpha} needs model.moe.balance=lag; or set aux_alpha to 0")
        return self
