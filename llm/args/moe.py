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
    swiglu: bool = Field(True, exclude_if=lambda value: value is True)
    """Experts are SwiGLU without biases; false = they are made as the dense feed-forward is, by model.act, model.gated
    and model.ffn_bias."""
    capacity: int | None = Field(None, gt=0, exclude_if=lambda value: value is None)
    """Most assignments that an expert takes in training; unset = all. Padding takes none. Evaluation and decoding have
    no limit, so that what is decoded equals the whole sequence."""
    capacity_scope: Literal["row", "call"] = Field("row", exclude_if=lambda scope: scope == "row")
    """Of what the capacity is: of each row of a batch, its tokens in order, the same on every layout; or of a whole
    forward, position by position over all rows, which is for one process and no run."""
    overflow: bool = Field(False, exclude_if=lambda value: value is False)
    """One more expert takes what the others have no place for, with the sum of its weights; false = that adds nothing.
    """
    balance: Literal["lag", "call", "none"] = "lag"
    """Balance loss: against the expert counts of the whole previous step, those of the same forward (for one process
    and no run), or none."""
    aux_times_experts: bool = Field(True, exclude_if=lambda value: value is True)
    """The balance loss has the factor n_experts, and so the value aux_alpha at perfect balance; false = aux_alpha /
    n_experts."""
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
        if self.capacity is None and self.overflow:
            raise ValueError("model.moe.overflow=true needs model.moe.capacity: without, no expert is ever full")
        if self.capacity is None and self.capacity_scope != "row":
            raise ValueError(f"model.moe.capacity_scope={self.capacity_scope} needs model.moe.capacity")
        return self
