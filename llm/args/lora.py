"""Keys of low-rank adapters (Hu et al. 2021, arXiv:2106.09685): beside a weight W, s B A of a small rank is trained."""

import math
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator

from llm.args.group import Group

TOWER = "vision_embeddings"
"""Begins the names of the vision tower's parameters; those of its projection are names of their own."""
OF_VISION = "vision."
"""Begins what `lora.targets` calls a weight of the vision tower."""
DEFAULT_TARGETS = ("wq", "wk", "wv", "wo", "w1", "w2", "w3", "experts", "wz", "wx", "wbc", "wdt")


def _names(value: object) -> object:
    return tuple(name for name in map(str.strip, value.split(",")) if name) if isinstance(value, str) else value


class LoraArgs(Group):
    """Adapters of a model, of one rank and scale."""

    rank: int = Field(16, ge=1, le=1 << 16)
    """Columns of B and rows of A."""
    alpha: float = Field(32.0, gt=0)
    """The adapter's product is multiplied by alpha / rank."""
    targets: Annotated[tuple[str, ...] | None, BeforeValidator(_names)] = None
    """What gets adapters: wq, wk, wv, wo, w1, w2, w3 (a shared expert's too), experts, of state-space layers wz, wx,
    wbc, wdt and wo; tok_embeddings, output; of the vision tower vision.wq and so on, vision.fc1, vision.fc2, and
    vision_projection; unset = all of layers, as far as the model has them."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the inputs of adapters that is set to 0 in training, in attention, feed-forwards and experts."""
    base: Literal["float", "int8"] = "float"
    """How the matrices of attention, feed-forwards and experts, which do not train, are kept: as they are, or in one
    byte a value with a scale for each output."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv:2312.03732)."""
    token_rows: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=1)]] | None = None
    """Tokens, from the first up to but not with the second, whose rows of token table and head train whole beside the
    adapters, as those of new tokens must."""

    @field_validator("token_rows")
    @classmethod
    def _rise(cls, rows: tuple[int, int] | None) -> tuple[int, int] | None:
        if rows is not None and rows[0] >= rows[1]:
            raise ValueError(f"lora.token_rows={list(rows)}: holds no token, as the second is the first one beyond")
        return rows

    @field_validator("targets")
    @classmethod
    def _some(cls, targets: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if targets == ():
            raise ValueError("lora.targets is empty, so nothing would train; leave it out for the usual ones")
        return targets

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def adapter(lora: LoraArgs | None, target: str) -> LoraArgs | None:
    """What weights of this name get, where they get one."""
    if lora is None:
        return None
    return lora if target in (DEFAULT_TARGETS if lora.targets is None else lora.targets) else None


def vision_adapters(lora: LoraArgs | None) -> LoraArgs | None:
    """The adapters of the vision tower, whose targets are there called as those of any layer; None where it has none.
    """
    named = () if lora is None else (lora.targets or ())
    targets = tuple(name.removeprefix(OF_VISION) for name in named if name.startswith(OF_VISION))
    return lora.model_copy(update={"targets": targets}) if lora is not None and targets else None


def target_of(name: str) -> str:
    """What `lora.targets` calls a weight of a model: wq for layers.0.attention.wq.weight, experts for one of a stack,
    vision.wq for one of the vision tower.
    """
    parts = name.split(".")
    module = "experts" if "experts" in parts else parts[-2]
    return f"{OF_VISION}{module}" if parts[0] == TOWER else module
