"""The sections of tasks, each called as its task: options that decide what a run trains on, and how."""

from pydantic import Field, model_validator

from llm.train.config.section import Section


class DpoConfig(Section):
    beta: float = Field(0.1, gt=0)
    """How much a reward is of a log-probability's gain on the reference model: the higher, the nearer to it."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of pairs that are taken to prefer the other answer."""


class MlmConfig(Section):
    rate: float = Field(0.15, gt=0, le=1)
    """Share of the tokens that are to be guessed; control tokens never are."""
    mask: float = Field(0.8, ge=0, le=1)
    """Share of these that the model sees as the mask token."""
    random: float = Field(0.1, ge=0, le=1)
    """Share of these that it sees as a random token; the rest it sees as they are."""
    mask_token: str | int | None = None
    """Name or id of the mask token; null: the tokenizer's <mask>, [MASK] or <|mask|>."""

    @model_validator(mode="after")
    def _shares_of_one_whole(self) -> "MlmConfig":
        if self.mask + self.random > 1 + 1e-9:  # 0.8 and 0.2 in binary
            raise ValueError(f"mlm.mask={self.mask} and mlm.random={self.random}: above 1 together")
        return self
