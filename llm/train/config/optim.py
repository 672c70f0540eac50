"""The section `optim`: optimizer and learning-rate schedule."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from llm.layers.parameter import ParameterKind
from llm.train.config.section import BY_COMMAS, Section

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Section):
    name: Literal["adamw", "sgd", "muon"] = "adamw"
    """adamw (fused), sgd (plain), or muon (Muon for matrices and expert stacks, AdamW for the rest)."""
    lr: float = Field(3.0e-4, gt=0)
    """Peak learning rate."""
    muon_lr: float | None = Field(None, gt=0)
    """Peak learning rate of what Muon updates; it follows the same schedule; null = optim.lr."""
    muon_momentum: float = Field(0.95, ge=0, lt=1)
    """Muon's (Nesterov) momentum."""
    lr_factors: dict[ParameterKind, Annotated[float, Field(ge=0)]] = {}
    """Factor on the learning rate for kinds of parameters (matrix, expert, norm, router, embedding, head, bias,
    adapter); 0 freezes: no update, no moments, no part in the gradient norm."""
    schedule: Literal["cosine", "linear", "wsd", "one_cycle", "constant"] = "cosine"
    """cosine; linear; wsd = warm-up, stable, decay (1 - sqrt); one_cycle = cosine from lr/25 up to lr, then down."""
    warmup_steps: int | None = Field(None, ge=0)
    """Steps of linear warm-up; null = 100, but at most a tenth of the run's steps; with one_cycle the steps of the
    rise, null = 30 % of the run's."""
    decay_steps: int | None = Field(None, ge=1)
    """Steps of the decay at the end of wsd; null = 20 % of the steps."""
    min_lr: float = Field(3.0e-5, ge=0)
    """Learning rate at the last step (constant: no effect); min_lr / lr holds for muon_lr and lr_factors too."""
    betas: Annotated[tuple[Beta, Beta], BY_COMMAS] = (0.9, 0.95)
    """AdamW's averages of gradient and squared gradient."""
    eps: float = Field(1.0e-8, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(0.1, ge=0)
    """Decay of matrices, expert stacks and adapters; never of norms, routers and embeddings."""
    clip_norm: float = Field(1.0, ge=0)
    """Largest global gradient norm; 0 = no clipping."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Keep an exponential moving average of the weights with this decay per step; null = none."""

    @model_validator(mode="after")
    def _consistent(self) -> "OptimConfig":
        if self.min_lr > self.lr:
            raise ValueError(f"optim.min_lr={self.min_lr} is above optim.lr={self.lr}")
        if self.decay_steps is not None and self.schedule != "wsd":
            raise ValueError(f"optim.decay_steps belongs to optim.schedule=wsd, not {self.schedule}")
        if self.muon_lr is not None and self.name != "muon":
            raise ValueError(f"optim.muon_lr belongs to optim.name=muon, not {self.name}")
        if self.schedule == "one_cycle" and self.warmup_steps == 0:
            raise ValueError(
                "optim.schedule=one_cycle needs optim.warmup_steps of at least 1, the steps of its rise; left out, "
                "they are 30 % of the steps"
            )
        return self
