"""`HyformerConfig`: what Hyformer's config says, and the keys of ModelArgs that say the same.

Hyformer is a Llama whose heads for tokens are its token table: RMS norms before attention and feed-forward, SwiGLU of
Llama's width, RoPE of base 10,000 over the two halves of a head, no biases. Its config file has eight keys; the rest of
ModelArgs can stand beside them, under `model_args`.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ValidationError

from llm.args import ModelArgs
from llm.atomic import write_file
from llm.errors import UserError

Prediction = Literal["classification", "regression", "multilabel"]
Pool = Literal["mean", "first", "last"]

MODEL_TYPE = "hyformer"
"""What config.json of a saved model says of itself."""
OURS = {
    "vocab_size": "vocab_size", "d_model": "dim", "n_heads": "n_heads", "n_layers": "n_layers",
    "max_seq_len": "max_seq_len", "attn_dropout": "attn_dropout", "resid_dropout": "resid_dropout", "eps": "norm_eps",
    "num_prediction_tasks": "n_prediction", "prediction": "prediction", "pool": "pool",
}  # fmt: skip
"""Their keys and ours."""
PRESET: dict[str, Any] = {"tie_embeddings": True, "rope_theta": 1e4, "rope_interleaved": False}
"""What its document says without a key."""
ABOUT_FILES = ("parts", "model_type", "architectures", "dtype", "torch_dtype", "transformers_version")
"""Keys of a config.json that say nothing of the model."""


@dataclass
class HyformerConfig:
    """What a Hyformer is. ValueError in one line, naming the key, where there is no such model."""

    model_type: ClassVar[str] = MODEL_TYPE

    vocab_size: int
    """Rows of the token table."""
    d_model: int = 512
    """Width of the residual stream."""
    n_heads: int = 8
    """Attention heads."""
    n_layers: int = 6
    """Blocks."""
    max_seq_len: int = 128
    """Tokens of the longest row."""
    attn_dropout: float = 0.0
    """Share of attention weights dropped in training."""
    resid_dropout: float = 0.0
    """Share of what attention and feed-forward add that is dropped in training."""
    eps: float = 1e-6
    """Added to the mean square in RMS norms."""
    num_prediction_tasks: int | None = field(default=None, kw_only=True)
    """Outputs of the model's own prediction head: classes, values or labels; None = it has none."""
    prediction: Prediction | None = field(default=None, kw_only=True)
    """What they are; None = one output is a value, several are classes, or values where labels are floats (B, n)."""
    pool: Pool = field(default="mean", kw_only=True)
    """What of a row the prediction head reads: the mean of its tokens' vectors, or that of the first or last token."""
    model_args: dict[str, Any] = field(default_factory=dict, kw_only=True)
    """Other keys of ModelArgs."""

    def __post_init__(self) -> None:
        args = self.args()
        for key, name in OURS.items():
            if _given(self, key):
                setattr(self, key, getattr(args, name))  # 512.0 of a file is 512

    def args(self) -> ModelArgs:
        """The model."""
        if self.num_prediction_tasks is None and (self.prediction is not None or self.pool != "mean"):
            raise ValueError("prediction and pool are of a prediction head; give num_prediction_tasks too")
        if not isinstance(self.model_args, dict):
            raise ValueError(f"model_args={self.model_args!r}: expected keys of ModelArgs and their values")
        if own := sorted(self.model_args.keys() & set(OURS.values())):
            theirs = next(key for key, name in OURS.items() if name == own[0])
            raise ValueError(f"model_args.{own[0]} is {theirs} here; give that")
        if isinstance(self.vocab_size, int) and self.vocab_size < 1:  # -1 has a meaning in a run's config
            raise ValueError(f"vocab_size={self.vocab_size} must be at least 1")
        said = {name: getattr(self, key) for key, name in OURS.items() if _given(self, key)}
        if self.num_prediction_tasks == 1 and self.prediction is None:
            said["prediction"] = "regression"
        try:
            args = ModelArgs.model_validate({**PRESET, **self.model_args, **said})
        except ValidationError as error:
            raise ValueError(_first_fault(error)) from None
        if self.num_prediction_tasks is not None and args.n_prediction < 1:
            raise ValueError(f"num_prediction_tasks={self.num_prediction_tasks} must be at least 1; None = no head")
        return args

    @classmethod
    def of(cls, args: ModelArgs) -> "HyformerConfig":
        """The config that says what a model is."""
        said = {key: getattr(args, name) for key, name in OURS.items()}
        if not args.n_prediction:
            said |= {"num_prediction_tasks": None, "prediction": None, "pool": "mean"}
        ours = set(OURS.values())
        usual = ModelArgs(dim=2, n_layers=1, n_heads=1).model_copy(update=PRESET)
        others = {
            key: value
            for key, value in args.model_dump(mode="json").items()
            if key not in ours and getattr(args, key) != getattr(usual, key)
        }
        return cls(**said, model_args=others)

    @classmethod
    def from_json(cls, path: str | Path) -> "HyformerConfig":
        """The config in a JSON file, or in config.json of a folder. UserError naming the file and the key."""
        file = Path(path)
        file = file / "config.json" if file.is_dir() else file
        try:
            text = file.read_bytes()
        except OSError as error:
            raise UserError(f"{file}: {error.strerror or error}") from None
        return cls.from_text(text, str(file))

    @classmethod
    def from_text(cls, text: str | bytes, name: str) -> "HyformerConfig":
        """The config that JSON says. UserError naming where it stands, `name`, and the key."""
        try:
            found = json.loads(text)
        except ValueError:
            raise UserError(f"{name}: is no JSON") from None
        if not isinstance(found, dict):
            raise UserError(f"{name}: is no JSON object of keys and values")
        if found.get("model_type", MODEL_TYPE) != MODEL_TYPE:
            raise UserError(f"{name}: model_type={found['model_type']}; a Hyformer's is {MODEL_TYPE}")
        said = {key: value for key, value in found.items() if key not in ABOUT_FILES}
        known = [entry.name for entry in fields(cls)]
        if unknown := sorted(said.keys() - set(known)):
            raise UserError(f"{name}: {unknown[0]} is no key of a Hyformer; they are {', '.join(known)}")
        if "vocab_size" not in said:
            raise UserError(f"{name}: vocab_size is missing")
        try:
            return cls(**said)
        except ValueError as error:
            raise UserError(f"{name}: {error}") from None

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "HyformerConfig":
        """`from_json`."""
        return cls.from_json(path)

    def to_dict(self) -> dict[str, Any]:
        """Keys and values: the eight of the document, and what is given beside them."""
        beside = {key for key in asdict(self) if _beside(key)}
        return {key: value for key, value in asdict(self).items() if key not in beside or _given(self, key)}

    def to_json(self, path: str | Path) -> None:
        """Write a file that `from_json` reads."""
        write_file(Path(path), (json.dumps(self.to_dict(), indent=2) + "\n").encode())


def _beside(key: str) -> bool:
    """Whether a key is one that the document does not have."""
    return next(entry for entry in fields(HyformerConfig) if entry.name == key).kw_only is True


def _given(config: HyformerConfig, key: str) -> bool:
    """Whether a key says something that its absence would not."""
    value = getattr(config, key)
    return not _beside(key) or value not in (None, {}) and (key, value) != ("pool", "mean")


def _first_fault(error: ValidationError) -> str:
    """The first thing that is wrong, in the words of this config."""
    fault = error.errors()[0]
    message = fault["msg"].removeprefix("Value error, ")
    for theirs, ours in OURS.items():
        message = message.replace(f"model.{ours}=", f"{theirs}=")
    if not fault["loc"]:
        return message
    ours = ".".join(map(str, fault["loc"]))
    theirs = next((key for key, name in OURS.items() if name == ours), f"model_args.{ours}")
    return f"{theirs}={fault['input']!r}: {message[0].lower()}{message[1:]}"
