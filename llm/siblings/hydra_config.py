"""What HYDRA says of a model and of its training: three models, one YAML with four sections, and the keys of the one
trainer that say the same.

Its models are hybrids of state-space and attention layers, each followed by a gated feed-forward, with RMS norms before
both, RoPE, and a head that is the token table: v1 alternates the two; in v2 attention is for some tokens only; v3
builds states from ever shorter streams.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from llm.args import ModelArgs
from llm.errors import UserError


class ModelType(Enum):
    """The models, by what they are called."""

    BASELINE = "v1"
    ROUTED = "v2"
    HIERARCHICAL = "v3"

    @classmethod
    def named(cls, name: str, key: str = "--model") -> "ModelType":
        """Of v1, v2, v3, baseline, routed or hierarchical. UserError with these for another name."""
        by_name = {one.value: one for one in cls} | {one.name.lower(): one for one in cls}
        if name.lower() not in by_name:
            raise UserError(f"{key}={name}: no such model; use {', '.join(by_name)}")
        return by_name[name.lower()]

    @property
    def pattern(self) -> list[str]:
        """Of its layers, over and over."""
        return PATTERNS[self]

    @property
    def says(self) -> str:
        """What it is, in a line."""
        return SAYS[self]

    @property
    def config_file(self) -> str:
        """Its config in this repository."""
        return f"configs/siblings/hydra_{self.name.lower()}.yaml"


PATTERNS = {
    ModelType.BASELINE: ["ssm", "attn"],
    ModelType.ROUTED: ["ssm", "routed"],
    ModelType.HIERARCHICAL: ["ssm", "ssm@4", "ssm@16", "attn@16"],
}
SAYS = {
    ModelType.BASELINE: "Baseline hybrid SSM-Transformer with alternating layers",
    ModelType.ROUTED: "Dynamic token routing between SSM and attention blocks",
    ModelType.HIERARCHICAL: "Hierarchical state organization across layers",
}
ALTERNATING = "alternating"
"""What layer_pattern is in its configs: v1's."""
HEAD_WIDTH = 64
"""Channels of a state-space layer that share a decay, or as many as divide them."""
IGNORED = ("num_workers",)
"""Keys of its YAML that have no meaning here: rows are read ahead by a thread."""
AT_ONCE = 16
"""Rows of a forward at most; more of a batch go one after the other."""


@dataclass
class TrainConfig:
    """All keys of its YAML, in one. ValueError in one line, naming the key, where one cannot be."""

    d_model: int = 768
    n_layers: int = 12
    layer_pattern: str | list[str] = ALTERNATING
    n_heads: int = 12
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dropout: float = 0.1
    vocab_size: int = 50257
    dataset_name: str = "wikitext"
    dataset_config: str | None = "wikitext-103-v1"
    tokenizer_name: str = "gpt2"
    max_length: int = 1024
    batch_size: int = 8
    num_workers: int = 4
    num_epochs: int = 20
    learning_rate: float = 3e-4
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    use_mixed_precision: bool = True
    use_wandb: bool = True
    project_name: str = "hydra-transformer"
    run_name: str = "v1-baseline"
    output_dir: str = "outputs/v1-baseline"

    def __post_init__(self) -> None:
        for one in fields(self):
            value: Any = getattr(self, one.name)
            kind: Any = type(one.default)
            if one.name in FREE:
                if not FREE[one.name](value):
                    raise ValueError(f"{one.name}={value!r}: expected {FREE_KINDS[one.name]}")
                continue
            if kind is float and isinstance(value, str) and EXPONENT.fullmatch(value):
                value = float(value)
                setattr(self, one.name, value)
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise ValueError(f"{one.name}={value!r}: expected {KINDS[kind]}")
            if kind in (int, float) and (value < 0 or (value == 0 and one.name not in MAY_BE_0)):
                raise ValueError(f"{one.name}={value!r}: must be {'at least' if one.name in MAY_BE_0 else 'above'} 0")

    def model_args(self, kind: ModelType = ModelType.BASELINE) -> ModelArgs:
        """The model. ValueError in one line, naming the key, where there is no such model."""
        channels = self.expand * self.d_model
        raw: dict[str, Any] = {
            "dim": self.d_model, "n_layers": self.n_layers, "n_heads": self.n_heads, "vocab_size": self.vocab_size,
            "max_seq_len": self.max_length, "layer_pattern": self.pattern(kind), "tie_embeddings": True,
            "rope_theta": 1e4, "rope_interleaved": False, "dropout": self.dropout,
            "ssm": {
                "d_state": self.d_state, "d_conv": self.d_conv, "expand": self.expand,
                "head_width": math.gcd(HEAD_WIDTH, channels),
            },
        }  # fmt: skip
        raw |= {"route": {}} if any("routed" in item for item in raw["layer_pattern"]) else {}
        try:
            return ModelArgs.model_validate(raw)
        except ValidationError as error:
            raise ValueError(_first_fault(error)) from None

    def pattern(self, kind: ModelType) -> list[str]:
        """Of the layers: those that layer_pattern names, or with `alternating` the model's own."""
        if self.layer_pattern == ALTERNATING:
            return kind.pattern
        said = self.layer_pattern
        return [item.strip() for item in said.split(",")] if isinstance(said, str) else list(said)


def _is_pattern(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


FREE: dict[str, Callable[[object], bool]] = {
    "layer_pattern": _is_pattern,
    "dataset_config": lambda value: value is None or isinstance(value, str),
}
"""Keys of several types, and whether a value is of one of them."""
FREE_KINDS = {"layer_pattern": "text, or a list of texts", "dataset_config": "text"}
EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")
"""A number that YAML takes for text, for want of a point (3e-4) or of a sign."""
MAY_BE_0 = ("num_workers", "dropout", "weight_decay", "grad_clip")
KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
OURS = {
    "d_model": "model.dim", "d_state": "model.ssm.d_state", "d_conv": "model.ssm.d_conv", "expand": "model.ssm.expand",
    "max_length": "model.max_seq_len", "n_heads": "model.n_heads", "n_layers": "model.n_layers",
    "layer_pattern": "model.layer_pattern", "dropout": "model.dropout", "vocab_size": "model.vocab_size",
}  # fmt: skip
"""What its keys are called here."""


def _first_fault(error: ValidationError) -> str:
    """The first thing that is wrong, in the words of its config."""
    fault = error.errors()[0]
    message = fault["msg"].removeprefix("Value error, ")
    for theirs, ours in OURS.items():
        message = message.replace(ours, theirs)
    place = f"model.{'.'.join(map(str, fault['loc']))}"
    key = next((theirs for theirs, ours in OURS.items() if ours == place), None)
    return message if key is None else f"{key}={fault['input']!r}: {message[0].lower()}{message[1:]}"


SECTIONS: dict[str, tuple[str, ...]] = {
    "model": (
        "d_model", "n_layers", "layer_pattern", "n_heads", "d_state", "d_conv", "expand", "dropout", "vocab_size",
    ),
    "data": ("dataset_name", "dataset_config", "tokenizer_name", "max_length", "batch_size", "num_workers"),
    "training": ("num_epochs", "learning_rate", "weight_decay", "grad_clip", "use_mixed_precision"),
    "logging": ("use_wandb", "project_name", "run_name", "output_dir"),
}  # fmt: skip


def default_config(kind: ModelType) -> TrainConfig:
    """The documented config of a model."""
    name = f"{kind.value}-{kind.name.lower()}"
    return TrainConfig(run_name=name, output_dir=f"outputs/{name}")


def read_config(path: str, kind: ModelType) -> tuple[TrainConfig, list[str]]:
    """A YAML of its four sections, the rest being the model's defaults; and lines on what of it has no meaning here.
    UserError naming the key that is not known, or cannot be."""
    try:
        raw = yaml.safe_load(Path(path).read_bytes())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config={path}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(raw, Mapping):
        raise UserError(f"--config={path}: expected the sections {', '.join(SECTIONS)}")
    given = dict(_keys(path, raw))
    notes = [f"{path}: {key} has no meaning here and is ignored" for key in IGNORED if key in given]
    if kind is not ModelType.BASELINE and given.get("layer_pattern") == ALTERNATING:
        notes.append(f"{path}: layer_pattern={ALTERNATING} is v1's; {kind.value} has {', '.join(kind.pattern)}")
    try:
        return TrainConfig(**{**vars(default_config(kind)), **given}), notes
    except ValueError as error:
        raise UserError(f"--config={path}: {error}") from None


def _keys(path: str, raw: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for section, values in raw.items():
        if section not in SECTIONS:
            raise UserError(f"--config={path}: {section} is not known; its sections are {', '.join(SECTIONS)}")
        if not isinstance(values, Mapping):
            raise UserError(f"--config={path}: {section}: expected keys and values")
        for key, value in values.items():
            if key not in SECTIONS[section]:
                raise UserError(
                    f"--config={path}: {section}.{key} is not known; known are {', '.join(SECTIONS[section])}"
                )
            yield key, value
