"""`TransformerConfig`: what Miniformer's config says of a model, and the keys of ModelArgs that say the same.

With "swiglu" it is a Llama: RMS norms, gated feed-forwards, no biases; with "gelu" or "relu" the first Transformer:
layer norms, two matrices, biases. RoPE has base 10,000 and turns the two halves of what it rotates of a head.
"""

import json
import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal, Self

from pydantic import ValidationError

from llm.args import ModelArgs
from llm.args.layers import either
from llm.errors import UserError
from llm.layers.activations import ACTIVATIONS
from llm.siblings.hyformer_config import ABOUT_FILES

Head = Literal["tokens", "classification", "regression", "multilabel", "values", "none"]
Pool = Literal["mean", "first", "last"]

MODEL_TYPE = "miniformer"
"""What config.json of a saved model says of itself."""
SWIGLU = "swiglu"
OURS = {
    "vocab_size": "vocab_size", "d_model": "dim", "n_heads": "n_heads", "n_layers": "n_layers", "d_ff": "ffn_hidden",
    "dropout": "resid_dropout", "activation": "act", "rotary_pct": "rope_pct", "pre_norm": "norm_place",
    "max_seq_len": "max_seq_len", "tie_weights": "tie_embeddings", "causal": "causal", "num_labels": "n_prediction",
    "head": "prediction", "pool": "pool", "input_dim": "input_dim", "output_dim": "output_dim",
}  # fmt: skip
"""Their keys and those of ours that say the same."""
PRESET: dict[str, Any] = {"rope_theta": 1e4, "rope_interleaved": False}
LLAMA: dict[str, Any] = {"act": "silu", "gated": True, "norm": "rms", "norm_eps": 1e-6}
FIRST: dict[str, Any] = {
    "gated": False, "norm": "layer", "norm_eps": 1e-5, "ffn_bias": True, "qkv_bias": True, "o_bias": True,
}  # fmt: skip
"""The first Transformer's, whose activation is said."""
DERIVED = {"attn_dropout", "embed_dropout", "pos", "norm_place", "pool", "prediction_causal", *PRESET, *LLAMA, *FIRST}
"""Keys of ours that follow from theirs, but may be given beside them."""
OF_LABELS = ("classification", "regression", "multilabel")


@dataclass
class TransformerConfig:
    """What a model is. ValueError in one line, naming the key, where there is no such model."""

    model_type: ClassVar[str] = MODEL_TYPE

    vocab_size: int | None = None
    """Rows of the token table, and logits of a token; None = neither is needed."""
    d_model: int = 512
    """Width of the residual stream."""
    n_heads: int = 8
    """Attention heads."""
    n_layers: int = 6
    """Layers; of an encoder-decoder, of each side."""
    d_ff: int | None = None
    """Width of the feed-forward as it is, gated or not; None = 4 d_model."""
    dropout: float = 0.1
    """Share dropped in training of attention weights, of what layers add, and of what enters the first one."""
    activation: str = "gelu"
    """gelu, relu, swiglu, or another that the project or an extension has."""
    rotary_pct: float = 1.0
    """Share of a head that RoPE rotates, rounded down to an even width; 0 = none, sinusoidal positions instead."""
    pre_norm: bool = True
    """Norms before attention and feed-forward, and one after the last layer; False = after each sum, as at first."""
    max_seq_len: int = 1024
    """Tokens of the longest row."""
    tie_weights: bool = field(default=False, kw_only=True)
    """The token table is the output matrix, too."""
    causal: bool | None = field(default=None, kw_only=True)
    """Whether a token sees none behind it; None = yes, but not where the head predicts labels of whole rows."""
    head: Head = field(default="tokens", kw_only=True)
    """What the model gives: logits of tokens; of classes or labels of a row; values of a row; values of each position;
    or hidden states."""
    num_labels: int | None = field(default=None, kw_only=True)
    """Classes, labels or values of a row."""
    input_dim: int | None = field(default=None, kw_only=True)
    """Numbers of each position of a model that reads feature vectors in place of tokens."""
    output_dim: int | None = field(default=None, kw_only=True)
    """Numbers that the head "values" gives for each position."""
    pool: Pool = field(default="mean", kw_only=True)
    """What of a row labels are predicted of: the mean of its tokens' vectors, or that of the first or last token."""
    model_args: dict[str, Any] = field(default_factory=dict, kw_only=True)
    """Further keys of ModelArgs: n_kv_heads, moe, ..."""

    def __post_init__(self) -> None:
        args = self.args()
        self.d_ff = args.ffn_width()

    @property
    def of_rows(self) -> bool:
        """Whether the head predicts something of whole rows."""
        return self.head in OF_LABELS

    @property
    def is_causal(self) -> bool:
        """`causal`, resolved."""
        return not self.of_rows if self.causal is None else self.causal

    def args(self) -> ModelArgs:
        """The model."""
        self._check()
        gated = self.activation == SWIGLU
        said: dict[str, Any] = {
            "vocab_size": -1 if self.vocab_size is None else self.vocab_size,
            "dim": self.d_model,
            "n_heads": self.n_heads,
            "n_layers": self.n_layers,
            "ffn_hidden": 4 * self.d_model if self.d_ff is None else self.d_ff,
            "dropout": self.dropout,
            "norm_place": "pre" if self.pre_norm else "post_add",
            "max_seq_len": self.max_seq_len,
            "tie_embeddings": self.tie_weights or self._needs_no_matrix,
            **PRESET,
            **(LLAMA if gated else {**FIRST, "act": self.activation}),
        }
        if self.input_dim is not None:
            said |= self._of_values()
        elif self.head == "values":
            said |= {"output_dim": self.output_dim, "causal": self.is_causal}
        elif self.of_rows:
            said |= {"n_prediction": self.num_labels, "prediction": self.head, "pool": self.pool}
            said |= {"prediction_causal": self.is_causal}
        else:
            said |= {"causal": self.is_causal}
        try:
            return ModelArgs.model_validate(said | self._sides() | self._rotation() | self.model_args)
        except ValidationError as error:
            raise ValueError(_first_fault(error)) from None

    @property
    def _needs_no_matrix(self) -> bool:
        """Whether nothing would read a matrix of its own for the logits of tokens, so that the table stands for it."""
        return self.head not in ("tokens", "values") and self.input_dim is None

    def _of_values(self) -> dict[str, Any]:
        """Of a model that reads feature vectors: what it says of a row is the output of the row's pooled states."""
        said: dict[str, Any] = {"input_dim": self.input_dim, "causal": self.is_causal}
        if self.head == "tokens":
            return said
        outputs = {"values": self.output_dim, "none": 1}.get(self.head, self.num_labels)
        return said | {"output_dim": outputs} | ({"pool": self.pool} if self.of_rows else {})

    def _check(self) -> None:
        """ValueError for what ModelArgs would not see, or would say in its own words alone."""
        if not isinstance(self.model_args, dict):
            raise ValueError(f"model_args={self.model_args!r}: expected keys of ModelArgs and their values")
        for theirs, ours in OURS.items():
            for key in {ours, theirs} & self.model_args.keys() - DERIVED:
                raise ValueError(f"model_args.{key} is {theirs} here; give that")
        known = (SWIGLU, *ACTIVATIONS)
        if self.activation not in known:
            raise ValueError(f"activation={self.activation!r} is not known; use {either(known)}")
        for key in ("d_model", "n_heads", "n_layers", "max_seq_len"):
            _whole(key, getattr(self, key))
        for key in ("vocab_size", "d_ff", "input_dim", "output_dim", "num_labels"):
            if getattr(self, key) is not None:
                _whole(key, getattr(self, key))
        _number("dropout", self.dropout, 0, 1, below=True)
        _number("rotary_pct", self.rotary_pct, 0, 1)
        for key in ("pre_norm", "tie_weights"):
            if not isinstance(getattr(self, key), bool):
                raise ValueError(f"{key}={getattr(self, key)!r}: expected true or false")
        heads = ("tokens", *OF_LABELS, "values", "none")
        if self.head not in heads:
            raise ValueError(f"head={self.head!r} is not known; use {either(heads)}")
        if self.of_rows != (self.num_labels is not None):
            instead = "give how many" if self.of_rows else "leave it out, or give head=classification or another"
            raise ValueError(f"num_labels={self.num_labels} with head={self.head}: {instead}")
        if (self.head == "values") != (self.output_dim is not None):
            instead = "give how many numbers" if self.head == "values" else "leave it out, or give head=values"
            raise ValueError(f"output_dim={self.output_dim} with head={self.head}: {instead}")
        if self.vocab_size is None and (self.input_dim is None or self.head == "tokens"):
            raise ValueError("vocab_size is missing: the model reads tokens, or says them")
        if self.tie_weights and (self.input_dim is not None or self.head == "values"):
            raise ValueError("tie_weights=true: one table is of models of tokens on both sides")

    def _sides(self) -> dict[str, Any]:
        """Which layers there are beside those of the stack."""
        return {}

    def _rotation(self) -> dict[str, Any]:
        """How positions are known: int(head width x rotary_pct) rounded down to an even number is rotated."""
        head = self.model_args.get("head_dim") or self.d_model // self.n_heads
        width = int(head * self.rotary_pct) // 2 * 2
        if not width:
            return {"pos": "sinusoidal"}
        share = width / head
        return {"rope_pct": share if int(head * share) == width else math.nextafter(share, 1)}

    @classmethod
    def of(cls, args: ModelArgs) -> Self:
        """The config that says what a model is. UserError where this class has no such model."""
        cls._check_sides(args)
        rotates = args.pos == "rope"
        said: dict[str, Any] = {
            "vocab_size": args.vocab_size,
            "d_model": args.dim,
            "n_heads": args.n_heads,
            "n_layers": args.n_layers,
            "d_ff": args.ffn_width(),
            "dropout": args.resid_dropout,
            "activation": SWIGLU if args.gated else args.act,
            "rotary_pct": args.rotated_width / args.head_width if rotates else 0.0,
            "pre_norm": args.norm_place != "post_add",
            "max_seq_len": args.max_seq_len,
            "tie_weights": args.tie_embeddings,
        }
        if args.vocab_size == -1:
            said["vocab_size"] = None
        said |= {"input_dim": args.input_dim, "causal": args.causal}
        if args.n_prediction:
            said |= {"head": args.prediction, "num_labels": args.n_prediction, "pool": args.pool}
            said |= {"causal": args.prediction_causal}
        elif args.output_dim is not None:
            said |= {"head": "values", "output_dim": args.output_dim}
        plain = cls(**said).args().model_dump(mode="json")
        others = {
            key: value
            for key, value in args.model_dump(mode="json").items()
            if key not in set(OURS.values()) - DERIVED and value != plain.get(key)
        }
        return cls(**said, model_args=others)

    @classmethod
    def _check_sides(cls, args: ModelArgs) -> None:
        if args.encoder_layers:
            raise UserError("the model has an encoder and a decoder; Seq2SeqTransformer reads it")

    @classmethod
    def from_text(cls, text: str | bytes, name: str) -> Self:
        """The config that JSON says. UserError naming where it stands, `name`, and the key."""
        found = json_object(text, name)
        if found.get("model_type", cls.model_type) != cls.model_type:
            raise UserError(f"{name}: model_type={found['model_type']}; this model's is {cls.model_type}")
        return cls.from_dict({key: value for key, value in found.items() if key not in ABOUT_FILES}, name)

    @classmethod
    def from_dict(cls, said: dict[str, Any], name: str) -> Self:
        """The config of these keys. UserError naming where they stand, `name`, and the key."""
        known = [entry.name for entry in fields(cls)]
        if unknown := sorted(said.keys() - set(known)):
            raise UserError(f"{name}: {unknown[0]} is no key of a model; they are {', '.join(known)}")
        try:
            return cls(**said)
        except ValueError as error:
            raise UserError(f"{name}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Keys and values: the ten of the document, and what is given beside them."""
        usual = {entry.name: entry for entry in fields(self) if entry.kw_only is True}
        return {
            key: value
            for key, value in asdict(self).items()
            if key not in usual or value not in (usual[key].default, {})
        }


@dataclass
class EncoderDecoderConfig(TransformerConfig):
    """The same of an encoder and a decoder of n_layers each. model_args may give the encoder another number."""

    model_type: ClassVar[str] = "miniformer_seq2seq"

    @classmethod
    def like(cls, config: TransformerConfig) -> "EncoderDecoderConfig":
        """The config whose sides are as those of a stack. ValueError where they cannot be."""
        return config if isinstance(config, cls) else cls(**asdict(config))

    def _sides(self) -> dict[str, Any]:
        if self.input_dim is not None:
            raise ValueError(f"input_dim={self.input_dim}: an encoder-decoder reads tokens here; of feature vectors "
                             f"llm.siblings.components has one")  # fmt: skip
        if self.head != "tokens" or not self.is_causal:
            raise ValueError(
                f"head={self.head}, causal={self.causal}: an encoder-decoder writes tokens, one after the other; leave "
                f"both out"
            )
        return {"encoder_layers": self.n_layers}

    @classmethod
    def _check_sides(cls, args: ModelArgs) -> None:
        if not args.encoder_layers:
            raise UserError("the model is one stack of layers; Transformer reads it")


def config_of(args: ModelArgs) -> TransformerConfig:
    """The config that says what a model is, of either class."""
    return EncoderDecoderConfig.of(args) if args.encoder_layers else TransformerConfig.of(args)


def json_object(text: str | bytes, name: str) -> dict[str, Any]:
    """What JSON says. UserError naming where it stands, and where in it the fault is."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{name}: is no JSON: {error.msg} at character {error.pos + 1}") from None
    except ValueError as error:
        raise UserError(f"{name}: is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{name}: is no JSON object of keys and values")
    return found


def _whole(key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{key}={value!r}: expected a whole number of at least 1")


def _number(key: str, value: Any, low: float, high: float, below: bool = False) -> None:
    right = not isinstance(value, bool) and isinstance(value, int | float) and low <= value <= high
    if not right or below and value == high:
        raise ValueError(f"{key}={value!r}: expected a number from {low} to {'below ' if below else ''}{high}")


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
    if fault["type"] == "extra_forbidden":
        return f"{theirs}={fault['input']!r}: is no key of ModelArgs"
    return f"{theirs}={fault['input']!r}: {message[0].lower()}{message[1:]}"
