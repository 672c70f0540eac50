"""Keys of state-space layers (Mamba-2; Dao and Gu 2024, arXiv:2405.21060)."""

from typing import Literal

from pydantic import Field, model_validator

from llm.args.group import Group

LEAST_CHUNK = 16
"""Of the kernels of mamba_ssm."""


class SSMArgs(Group):
    """The mixers called ssm in the layer pattern."""

    d_state: int = Field(128, gt=0, le=1 << 16)
    """Width of the state of each channel."""
    d_conv: int = Field(4, gt=1, le=64)
    """Taps of the convolution before the recurrence."""
    expand: int = Field(2, gt=0, le=64)
    """Channels inside, as a multiple of model.dim."""
    head_width: int = Field(64, gt=0, le=1 << 16)
    """Channels that share a decay."""
    heads: int | None = Field(None, gt=0, le=1 << 20, exclude_if=lambda value: value is None)
    """Heads of head_width channels, whatever expand and model.dim are; unset = as many as expand says."""
    groups: int = Field(1, gt=0)
    """Groups of heads that share what is written to the state and read from it, and are normalised together."""
    chunk: int = Field(64, gt=0, le=1 << 12)
    """Tokens that are computed as one product; changes rounding, memory and speed alone."""
    kernel: Literal["torch", "mamba_ssm"] = Field("torch", exclude_if=lambda value: value == "torch")
    """What computes the recurrence over whole rows: torch, or the fused kernels of the package mamba_ssm on a CUDA
    device; changes rounding, memory and speed alone. A model that is read from a checkpoint computes by torch."""
    dt_limit: tuple[float, float | None] = (0.0, None)
    """Least and greatest time step; null = none is too great."""
    bias: bool = False
    """Biases of the linear layers."""
    conv_bias: bool = True
    """A bias of the convolution."""
    norm: Literal["after_gate", "before_gate", "none"] = Field(
        "after_gate", exclude_if=lambda value: value == "after_gate"
    )
    """Where what the recurrence says is normalised, with weights: after it is multiplied with silu of its gate, before,
    or nowhere."""
    scales: tuple[float, float, float, float, float] | None = Field(None, exclude_if=lambda value: value is None)
    """Factors on gates, channels, what is written to the state, what is read from it, and time steps, as the first
    linear layers make them; unset = 1."""

    def widths(self, dim: int) -> tuple[int, int]:
        """Channels and heads in a model of this width."""
        if self.heads is not None:
            return self.heads * self.head_width, self.heads
        return self.expand * dim, self.expand * dim // self.head_width

    @model_validator(mode="after")
    def _check(self) -> "SSMArgs":
        low, high = self.dt_limit
        if low < 0 or (high is not None and not low < high):
            raise ValueError(f"model.ssm.dt_limit={[low, high]}: the first must be at least 0 and below the second")
        if self.kernel == "mamba_ssm" and (self.chunk < LEAST_CHUNK or self.chunk & (self.chunk - 1)):
            raise ValueError(
                f"model.ssm.chunk={self.chunk}: model.ssm.kernel=mamba_ssm takes powers of 2 from {LEAST_CHUNK}; use 64"
            )
        return self
