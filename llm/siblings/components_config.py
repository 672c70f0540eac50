"""What the constructors of Transformer Components say of a model, and the keys of ModelArgs that say the same.

The first Transformer's layers (Vaswani et al. 2017, arXiv:1706.03762): layer norms behind each sum and none at the end,
two matrices with a ReLU between them, biases everywhere, sinusoids added to what a linear map makes of the values.
"""

import json
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, Self

from pydantic import ValidationError

from llm.args import ModelArgs
from llm.errors import UserError
from llm.siblings.hyformer_config import ABOUT_FILES

AttentionType = Literal["mha", "mqa", "gqa"]
ATTENTION_TYPES: tuple[AttentionType, ...] = ("mha", "mqa", "gqa")
PRESET: dict[str, Any] = {
    "pos": "sinusoidal", "norm": "layer", "norm_place": "post_add", "norm_eps": 1e-5, "act": "relu", "gated": False,
    "ffn_bias": True, "qkv_bias": True, "o_bias": True,
}  # fmt: skip
OF_MOE = ("num_experts", "capacity")


@dataclass(frozen=True)
class FFNConfig:
    """The feed-forward of every layer. ValueError in one line, naming the key, where there is no such one."""

    embed_dim: int
    """Width of what it reads and writes; the model's."""
    latent_dim: int
    """Width of its hidden units, of each expert."""
    use_moe: bool = False
    """A mixture of experts in the place of one feed-forward."""
    num_experts: int | None = None
    """Experts; with use_moe it must be given."""
    capacity: int | None = None
    """Most assignments of a forward that an expert takes in training; the overflow expert takes the others. None = no
    limit, and no overflow expert."""
    alpha: float = 0.01
    """Weight of the balance loss."""
    topk: int = 1
    """Experts of a token."""

    def __post_init__(self) -> None:
        for key in ("embed_dim", "latent_dim", *(OF_MOE if self.use_moe else ()), "topk"):
            value = getattr(self, key)
            if not (value is None and key == "capacity"):
                whole(key, value)
        if not self.use_moe:
            return
        if self.topk > (self.num_experts or 0):
            raise ValueError(f"topk={self.topk} exceeds num_experts={self.num_experts}")
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or not self.alpha >= 0:
            raise ValueError(f"alpha={self.alpha!r}: expected a number, 0 or more")

    def moe(self) -> dict[str, Any] | None:
        """`ModelArgs.moe`; None without experts."""
        if not self.use_moe:
            return None
        return moe_keys(self.latent_dim, self.num_experts or 0, self.capacity, self.alpha, self.topk)


def moe_keys(latent_dim: int, num_experts: int, capacity: int | None, alpha: float, topk: int) -> dict[str, Any]:
    """Keys of MoEArgs. The weights of one expert alone are not divided by their sum, which would make them 1 and cut
    the router off from what the model learns."""
    return {
        "n_experts": num_experts,
        "top_k": topk,
        "hidden": latent_dim,
        "score": "softmax",
        "renorm": topk > 1,
        "apply": "output",
        "shared": False,
        "swiglu": False,
        "capacity": capacity,
        "capacity_scope": "row" if capacity is None else "call",
        "overflow": capacity is not None,
        "aux_alpha": alpha,
        "aux_times_experts": False,
        "balance": "call",
    }


def whole(key: str, value: Any) -> None:
    """ValueError where a value is no whole number from 1 on."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{key}={value!r}: expected a whole number, 1 or more")


def kv_heads(attention_type: str, num_heads: int, num_groups: int | None) -> int:
    """Heads of keys and values. ValueError naming the key."""
    if attention_type not in ATTENTION_TYPES:
        raise ValueError(f"attention_type={attention_type!r} is not known; use {', '.join(ATTENTION_TYPES)}")
    if attention_type != "gqa":
        return num_heads if attention_type == "mha" else 1
    groups = max(1, num_heads // 2) if num_groups is None else num_groups
    whole("num_groups", groups)
    if num_heads % groups:
        raise ValueError(f"num_groups={groups} does not divide num_heads={num_heads}")
    return groups


def layer_keys(
    embed_dim: int, num_heads: int, heads: int, ffn: FFNConfig | None, latent_dim: int, causal: bool
) -> dict[str, Any]:
    """Keys of ModelArgs that say what a layer is. heads: of keys and values."""
    whole("embed_dim", embed_dim)
    whole("num_heads", num_heads)
    whole("ffn_latent_dim", latent_dim)
    if embed_dim % num_heads:
        raise ValueError(f"num_heads={num_heads} does not divide embed_dim={embed_dim}")
    for key, own, other in (("embed_dim", embed_dim, "embed_dim"), ("ffn_latent_dim", latent_dim, "latent_dim")):
        if ffn is not None and getattr(ffn, other) != own:
            raise ValueError(f"{key}={own} and ffn_config.{other}={getattr(ffn, other)} must be the same")
    return {
        **PRESET,
        "dim": embed_dim,
        "n_heads": num_heads,
        "n_kv_heads": heads,
        "ffn_hidden": latent_dim,
        "causal": causal,
        "moe": None if ffn is None else ffn.moe(),
    }


def model_args(said: dict[str, Any]) -> ModelArgs:
    """ValueError in one line where these keys make no model."""
    try:
        return ModelArgs.model_validate(said)
    except ValidationError as error:
        raise ValueError(str(error.errors()[0]["msg"]).removeprefix("Value error, ")) from None


@dataclass(frozen=True, kw_only=True)
class ComponentsConfig:
    """What a model was made of: the arguments of its constructor."""

    model_type: ClassVar[str] = "transformer_components"

    kind: Literal["regression", "autoregressive", "encoder_decoder"]
    input_dim: int
    embed_dim: int
    ffn_latent_dim: int
    num_layers: int
    """Of an encoder-decoder, the decoder's."""
    num_heads: int
    output_dim: int
    num_encoder_layers: int = 0
    apply_causal_mask: bool = False
    max_seq_len: int = 512
    attention_type: str = "mha"
    ffn_config: FFNConfig | None = None
    use_kv_cache: bool = False
    num_groups: int | None = None
    dropout: float = 0.0

    def args(self) -> ModelArgs:
        """The model. ValueError in one line, naming the key, where there is none."""
        for key in ("input_dim", "output_dim", "num_layers", "max_seq_len"):
            whole(key, getattr(self, key))
        if self.kind == "encoder_decoder":
            whole("num_encoder_layers", self.num_encoder_layers)
        heads = kv_heads(self.attention_type, self.num_heads, self.num_groups)
        layer = layer_keys(
            self.embed_dim, self.num_heads, heads, self.ffn_config, self.ffn_latent_dim, self.apply_causal_mask
        )
        return model_args(
            layer
            | {
                "input_dim": self.input_dim,
                "output_dim": self.output_dim,
                "n_layers": self.num_layers,
                "encoder_layers": self.num_encoder_layers,
                "max_seq_len": self.max_seq_len,
                "dropout": self.dropout,
            }
        )

    def to_dict(self) -> dict[str, Any]:
        """What JSON says of it."""
        return asdict(self)

    @classmethod
    def from_text(cls, text: str | bytes, name: str) -> Self:
        """The config that JSON says. UserError naming where it stands, `name`, and the key."""
        try:
            found = json.loads(text)
        except ValueError:
            raise UserError(f"{name}: is no JSON") from None
        if not isinstance(found, dict) or found.get("model_type") != cls.model_type:
            raise UserError(f"{name}: is no config of {cls.model_type}")
        said = {key: value for key, value in found.items() if key not in ABOUT_FILES}
        unknown = sorted(said.keys() - {entry.name for entry in fields(cls)})
        if unknown:
            raise UserError(f"{name}: unknown key {unknown[0]}")
        try:
            if isinstance(said.get("ffn_config"), dict):
                said["ffn_config"] = FFNConfig(**said["ffn_config"])
            config = cls(**said)
            config.args()
        except (TypeError, ValueError) as error:
            raise UserError(f"{name}: {error}") from None
        return config

    @classmethod
    def of(cls, args: ModelArgs) -> Self:
        """Raises UserError: a model of another kind has no such config."""
        raise UserError(
            f"model.norm_place={args.norm_place}: only a folder that save_pretrained of this module wrote is read here"
        )
