"""Keys of routed layers, in which some tokens also attend."""

from typing import Literal

from pydantic import Field, model_validator

from llm.args.group import Group


class RouteArgs(Group):
    """The mixers called routed in the layer pattern: a state-space mixer for all tokens, attention for some."""

    rate: float = Field(0.15, gt=0, lt=1)
    """Share of tokens that are to attend; a threshold on their scores follows it."""
    max_rate: float = Field(0.3, gt=0, le=1)
    """Of the first t tokens of a document at most this share attend, rounded down, and `burst` more."""
    burst: int = Field(16, ge=0)
    """Tokens of a document that may attend beyond max_rate."""
    combine: Literal["add", "select"] = "add"
    """What attention says is added to what the state says, or takes its place."""
    ema: float = Field(0.9, ge=0, lt=1)
    """How much of a threshold stays from step to step; the rest comes from the scores of the step."""
    thresholds: tuple[float, ...] | None = Field(None, exclude_if=lambda value: value is None)
    """Of the routed layers, in their order, as training left them; unset = 0."""

    @model_validator(mode="after")
    def _check(self) -> "RouteArgs":
        if self.max_rate < self.rate:
            raise ValueError(f"model.route.max_rate={self.max_rate} is below model.route.rate={self.rate}")
        return self
