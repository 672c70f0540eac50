"""Keys of rotary position embeddings."""

from typing import Literal

from pydantic import Field, model_validator

from llm.args.group import Group


class RopeScaling(Group):
    """Stretching of RoPE to contexts longer than those of the pretraining."""

    kind: Literal["llama3", "linear", "dynamic", "yarn"] = "llama3"
    """linear divides all frequencies, llama3 and yarn the slow ones; dynamic raises the base with a text's length."""
    factor: float = Field(8.0, gt=0)
    """How many times longer the context became."""
    low_freq_factor: float = Field(1.0, gt=0)
    """llama3: wavelengths above original_max_position / this are stretched in full."""
    high_freq_factor: float = Field(4.0, gt=0)
    """llama3: wavelengths below original_max_position / this are left alone."""
    original_max_position: int = Field(8192, gt=0)
    """Context length before the stretching."""
    beta_fast: float = Field(32.0, gt=0)
    """yarn: frequencies that turn at least so often within the original context are left alone."""
    beta_slow: float = Field(1.0, gt=0)
    """yarn: those that turn at most so often are stretched in full."""
    truncate: bool = True
    """yarn: begin and end the ramp between the two at whole dimensions."""
    attention_factor: float | None = Field(None, gt=0)
    """yarn: factor on rotated queries and keys; unset = 0.1 ln(factor) + 1."""

    @model_validator(mode="after")
    def _check(self) -> "RopeScaling":
        if self.high_freq_factor < self.low_freq_factor:
            raise ValueError(
                f"model.rope_scaling.high_freq_factor={self.high_freq_factor} is below "
                f"low_freq_factor={self.low_freq_factor}; it must be at least as large"
            )
        if self.beta_fast < self.beta_slow:
            raise ValueError(
                f"model.rope_scaling.beta_fast={self.beta_fast} is below beta_slow={self.beta_slow}; "
                f"it must be at least as large"
            )
        return self
