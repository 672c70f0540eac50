"""`ModelArgs`: the keys of one model, and the rules that resolve them to layers and widths.

Names and rules follow Llama 4 (Meta's params.json); what other families need beside them is off by default.
"""

import math
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field, model_validator

from llm.args.group import Group
from llm.args.layers import (
    ACTIVATIONS,
    MIXERS,
    PATTERN_ALIASES,
    POSITIONS,
    LayerSpec,
    NormsSpec,
    QKNorm,
    either,
    parse_item,
    refuse,
)
from llm.args.lora import LoraArgs, adapter
from llm.args.moe import MoEArgs
from llm.args.rope import RopeScaling
from llm.args.route import RouteArgs
from llm.args.ssm import SSMArgs
from llm.args.sum import SumArgs
from llm.args.values import check_values
from llm.args.vision import VisionArgs

OUTPUTS = ("n_prediction", "prediction")
"""Keys that say what a prediction head's outputs are: with other ones it is another head."""
OF_OUTPUTS = ("pool", "prediction_causal")
"""Further keys of a prediction head."""
SETTLED = ("prediction_names", "prediction_mean", "prediction_std")
"""Keys of a prediction head that a run learns from its rows."""
OF_VALUES = ("input_mean", "input_std", "output_mean", "output_std")
"""Keys of a model of values that a run learns from its rows."""
DROPPED_BY_ONE_KEY = ("attn_dropout", "resid_dropout", "embed_dropout")
"""What `dropout` sets."""


def unset(value: object) -> bool:
    """Whether a key is as if it were not there, and is left out of what is written: of keys younger than the files."""
    return value is None or value is False


def zero(value: object) -> bool:
    """The same of a rate."""
    return value == 0


def with_dropout(given: dict[str, Any]) -> dict[str, Any]:
    """Model keys as they were written, with those that `dropout` sets in its place. ValueError where it is no rate."""
    if "dropout" not in given:
        return given
    rest = {key: value for key, value in given.items() if key != "dropout"}
    rate = given["dropout"]
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1:
        raise ValueError(f"model.dropout={rate}: expected a number from 0 to below 1")
    return dict.fromkeys(DROPPED_BY_ONE_KEY, rate) | rest


class ModelArgs(Group):
    """The architecture of one model. Checked at construction; a ValueError names the key and what is possible."""

    dim: int = Field(gt=0, le=1 << 20)
    """Width of the residual stream."""
    n_layers: int = Field(gt=0, le=1 << 16)
    """Number of layers."""
    encoder_layers: int = Field(0, ge=0, le=1 << 16, exclude_if=zero)
    """Layers of an encoder, which reads the source of each document both ways; those of the decoder then attend to what
    it makes of it. 0 = no encoder. It has the widths, norms, feed-forwards and pattern of the n_layers of the decoder.
    """
    n_heads: int = Field(gt=0, le=1 << 20)
    """Query heads."""
    n_kv_heads: int | None = Field(None, gt=0)
    """Key and value heads; unset = n_heads."""
    head_dim: int | None = Field(None, gt=0)
    """Width of one head; unset = dim / n_heads."""
    vocab_size: int = -1
    """Rows of the token table; -1 = taken from the tokenizer before the model is built."""
    input_dim: int | None = Field(None, gt=0, le=1 << 20, exclude_if=unset)
    """The model reads rows of so many numbers instead of tokens, through a linear map in the token table's place."""
    output_dim: int | None = Field(None, gt=0, le=1 << 20, exclude_if=unset)
    """The model predicts so many numbers instead of the next token, by a linear map in the output matrix's place."""
    input_mean: tuple[float, ...] | None = Field(None, exclude_if=unset)
    """Of each number that is read: what is taken from it; unset = 0."""
    input_std: tuple[float, ...] | None = Field(None, exclude_if=unset)
    """Of each number that is read: what the rest is divided by; unset = 1."""
    output_mean: tuple[float, ...] | None = Field(None, exclude_if=unset)
    """Of each number that is predicted: what is taken from it before it is learned; unset = 0."""
    output_std: tuple[float, ...] | None = Field(None, exclude_if=unset)
    """Of each number that is predicted: what it is divided by before it is learned; unset = 1."""
    causal: bool = Field(True, exclude_if=lambda value: value is True)
    """Whether tokens see none behind them, where a batch does not say; false = they see their document both ways."""
    max_seq_len: int = Field(2048, gt=0)
    """Longest text the model is meant for; nothing in the model is sized by it."""
    layer_pattern: list[str] | str | None = None
    """Items mixer[@stride][:flag...][+ffn] (attn|ssm|routed|sum|none, full|chunk|window, rope|nope, dense|moe|none),
    repeated over the layers."""
    ffn_hidden: int | None = Field(None, gt=0)
    """Width of the dense feed-forward; unset = 8/3 dim, times ffn_dim_multiplier, rounded up to multiple_of."""
    multiple_of: int = Field(256, gt=0)
    """Feed-forward widths made by rule are rounded up to a multiple of this."""
    ffn_dim_multiplier: float | None = Field(None, gt=0)
    """Factor on feed-forward widths made by rule."""
    ffn_exp: float = Field(4.0, gt=0)
    """Expansion from which the width of an expert is made by rule."""
    act: str = "silu"
    """Activation of dense feed-forwards: silu, gelu (the exact one), gelu_tanh (its approximation), relu, relu2 (its
    square), or one that an extension adds. Experts use silu."""
    gated: bool = True
    """Dense feed-forwards multiply the activation with a second product, w3 x; false = w2(act(w1 x))."""
    ffn_bias: bool = False
    """Biases in dense feed-forwards."""
    ffn_scales: tuple[float, float] | None = Field(None, exclude_if=unset)
    """Of dense feed-forwards: factors on what the activation is taken of, and on what they make; unset = 1."""
    qkv_bias: bool = False
    """Biases of queries, keys and values."""
    o_bias: bool = False
    """Bias of the attention's output."""
    norm: Literal["rms", "layer"] = "rms"
    """RMS norm, or layer norm with a bias."""
    norm_eps: float = Field(1e-5, gt=0)
    """Added to the mean square (layer norm: variance) in every norm."""
    norm_offset: bool = False
    """RMS norms multiply with 1 + weight, before the cast back from float32 (Gemma); weights begin at 0."""
    norm_fp32_weight: bool = False
    """RMS norms multiply with the weight before the cast back from float32 (OLMo 2)."""
    norm_place: Literal["pre", "post", "sandwich", "post_add"] = "pre"
    """Norms before attention and feed-forward, after them and before the sum (OLMo 2), or both (Gemma 2); post_add:
    after the sum (the first Transformers, BERT), and then there is none after the last layer."""
    final_norm_plain: bool = Field(False, exclude_if=unset)
    """The norm after the last layer multiplies with the weight where the others multiply with 1 + weight."""
    post_norm_eps: float | None = Field(None, gt=0, exclude_if=unset)
    """Added to the mean square in norms after attention and feed-forward; unset = norm_eps."""
    embed_norm: bool = Field(False, exclude_if=unset)
    """An RMS norm without weights of token vectors, those of images included."""
    input_norm: bool = Field(False, exclude_if=unset)
    """A norm with weights of what enters the first layer, positions included (BERT, BART); of an encoder-decoder one of
    each side."""
    parallel_residual: bool = False
    """Attention and feed-forward read the same x, each through its own norm (GPT-NeoX)."""
    qk_norm: QKNorm | None = None
    """Each head, without weights: l2 after RoPE, on RoPE layers; plain before it, on all. With weights, before RoPE:
    head each head, full all of them as one."""
    pos: str = Field("rope", exclude_if=lambda pos: pos == "rope")
    """How positions are known: rope rotates queries and keys; sinusoidal adds waves to token vectors, learned the rows
    of a table of max_seq_len, after embed_scale and embed_norm; none; or one that an extension adds."""
    rope_theta: float = Field(5e5, gt=0)
    """RoPE base."""
    rope_interleaved: bool = True
    """Rotate neighbouring pairs (Meta); false = the two halves of a head (Hugging Face Llama)."""
    rope_pct: float = Field(1.0, gt=0, le=1)
    """Share of a head's width that is rotated, from its beginning, rounded down."""
    rope_scaling: RopeScaling | None = None
    """Frequency scaling for longer contexts."""
    nope_layer_interval: int | None = Field(None, gt=0)
    """Every interval-th layer has no RoPE and, where chunking is on, global attention."""
    attention_chunk_size: int | None = Field(None, gt=0)
    """RoPE layers attend within chunks of this many positions, counted from the start of the document."""
    sliding_window: int | None = Field(None, gt=0)
    """Layers attend to the last so many positions, their own included, unless chunks or the pattern say otherwise."""
    score_scale: float | None = Field(None, gt=0)
    """Factor on attention scores; unset = 1 / sqrt(width of a head)."""
    attn_softcap: float | None = Field(None, gt=0)
    """Attention scores s become cap tanh(s / cap)."""
    attn_gate: bool = Field(False, exclude_if=unset)
    """Multiply what attention makes of the values with the sigmoid of another product, wg x."""
    logit_scale: float | None = Field(None, gt=0, exclude_if=unset)
    """Factor on logits, before the cap."""
    logit_softcap: float | None = Field(None, gt=0)
    """Logits z become cap tanh(z / cap)."""
    embed_scale: float | None = Field(None, gt=0)
    """Factor on token vectors, those of images included, rounded to their dtype."""
    attn_temperature_tuning: bool = False
    """Scale queries of NoPE layers with the logarithm of the position."""
    floor_scale: int = Field(8192, gt=0)
    """Positions per step of the temperature."""
    attn_scale: float = 0.1
    """Strength of the temperature."""
    attn_dropout: float = Field(0.0, ge=0, lt=1, exclude_if=zero)
    """Share of attention weights that training drops. model.dropout sets this, resid_dropout and embed_dropout, where
    they are not given themselves."""
    resid_dropout: float = Field(0.0, ge=0, lt=1, exclude_if=zero)
    """Share dropped of what attention and feed-forward add to the residual stream."""
    embed_dropout: float = Field(0.0, ge=0, lt=1, exclude_if=zero)
    """Share dropped of what enters the first layer."""
    ffn_dropout: float = Field(0.0, ge=0, lt=1, exclude_if=zero)
    """Share dropped of the hidden units of feed-forwards, of each expert's for each token apart."""
    head_dropout: float = Field(0.0, ge=0, lt=1, exclude_if=zero)
    """Share dropped of what a prediction head, or the output in a regression over values, reads."""
    tie_embeddings: bool = False
    """Use the token table as output matrix."""
    init_std: float = Field(0.02, gt=0)
    """Standard deviation of initial weights."""
    init_depth_scale: bool = False
    """Divide the initial wo and w2 by sqrt(2 n_layers)."""
    n_prediction: int = Field(0, ge=0, le=1 << 20, exclude_if=lambda n: n == 0)
    """Outputs of a head that predicts labels or values of a document: classes, labels or values; 0 = no such head."""
    prediction: Literal["classification", "regression", "multilabel"] = Field(
        "classification", exclude_if=lambda kind: kind == "classification"
    )
    """What the head predicts: one of the classes, values, or labels that are there or not, each for itself."""
    pool: Literal["mean", "first", "last"] = Field("mean", exclude_if=lambda pool: pool == "mean")
    """What of a document the head, or the output in a regression over values, reads: the mean of its tokens' vectors,
    or the vector of the first or last one."""
    prediction_causal: bool = Field(False, exclude_if=unset)
    """The head's documents are read from left to right; false = both ways."""
    prediction_names: tuple[str, ...] | None = Field(None, exclude_if=unset)
    """What the outputs stand for: classes, or columns of labels; unset = as the training rows say."""
    prediction_mean: tuple[float, ...] | None = Field(None, exclude_if=unset)
    """Of a regression, for each output: what is taken from a label before it is learned; unset = 0."""
    prediction_std: tuple[float, ...] | None = Field(None, exclude_if=unset)
    """Of a regression, for each output: what a label is divided by before it is learned; unset = 1."""
    moe: MoEArgs | None = None
    """Mixture of experts; unset = every layer is dense."""
    ssm: SSMArgs | None = Field(None, exclude_if=unset)
    """State-space layers, which layer_pattern places; unset = there are none."""
    route: RouteArgs | None = Field(None, exclude_if=unset)
    """Routed layers, which layer_pattern places; unset = there are none."""
    sum: SumArgs | None = Field(None, exclude_if=unset)
    """Of layers that are a state-space mixer and attention added, where layer_pattern has any; unset = defaults."""
    vision: VisionArgs | None = Field(None, exclude_if=unset)
    """A tower that reads pictures; unset = text alone, and then no key in what is written."""
    lora: LoraArgs | None = None
    """Low-rank adapters beside the weights; unset = none. In a run config the section `lora` sets it."""

    @model_validator(mode="before")
    @classmethod
    def _resolve_dropout(cls, given: Any) -> Any:
        return with_dropout(given) if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _check(self) -> "ModelArgs":
        if self.vocab_size != -1 and self.vocab_size < 1:
            raise ValueError(f"model.vocab_size={self.vocab_size} must be positive, or -1 to take the tokenizer's")
        if self.n_heads % self.kv_heads:
            raise ValueError(
                f"model.n_kv_heads={self.kv_heads} does not divide model.n_heads={self.n_heads}; "
                f"use {either(_divisors(self.n_heads))}"
            )
        if self.head_dim is None and self.dim % self.n_heads:
            raise ValueError(
                f"model.n_heads={self.n_heads} does not divide model.dim={self.dim}; "
                f"use {either(_divisors(self.dim))}, or give model.head_dim"
            )
        for key, table in (("act", ACTIVATIONS), ("pos", POSITIONS)):
            if (name := getattr(self, key)) not in table:
                raise ValueError(f"model.{key}={name}: unknown {table.what}; use {either(table)}")
        self._check_positions()
        if self.parallel_residual and self.norm_place != "pre":
            raise ValueError(f"model.parallel_residual needs model.norm_place=pre; got {self.norm_place}")
        if self.norm == "layer" and (self.norm_offset or self.norm_fp32_weight):
            raise ValueError("model.norm_offset and norm_fp32_weight are of RMS norms; leave them out with norm=layer")
        if self.final_norm_plain and (not self.norm_offset or not self.has_final_norm):
            raise ValueError(
                "model.final_norm_plain is of models with norm_offset and a norm after the last layer; leave it out"
            )
        if self.post_norm_eps is not None and self.norm_place == "pre":
            raise ValueError(f"model.post_norm_eps={self.post_norm_eps} is of norms that norm_place=pre does not have")
        last = max(self.n_layers, self.encoder_layers) - 1
        if self.moe is not None and any(not 0 <= i <= last for i in self.moe.dense_layers):
            raise ValueError(f"model.moe.dense_layers={list(self.moe.dense_layers)}: layers are 0 to {last}")
        self._check_encoder()
        for key in ("prediction", *OF_OUTPUTS):
            if key == "pool" and self.output_dim is not None:
                continue  # the task `regression` pools what the output reads
            if not self.n_prediction and getattr(self, key) != ModelArgs.model_fields[key].default:
                raise ValueError(
                    f"model.{key}={getattr(self, key)}: is of a prediction head, and model.n_prediction=0 has none"
                )
        if self.n_prediction == 1 and self.prediction == "classification":
            raise ValueError(
                "model.n_prediction=1: a classification has 2 classes or more; of one value set "
                "model.prediction=regression, of one label that is there or not multilabel"
            )
        self._check_scaling()
        self._check_ssm()
        self._check_thresholds()
        check_values(self)
        if self.moe is not None and not self.moe.swiglu and adapter(self.lora, "experts") is not None:
            raise ValueError("lora.targets: experts of model.moe.swiglu=false have no adapters; name the other targets")
        self._check_both_ways()
        return self

    def _check_both_ways(self) -> None:
        """Raises ValueError where tokens are to see those behind them in layers that keep a state of what came before.
        """
        layers = self.layer_specs()  # which refuses patterns that mean nothing
        both_ways = {"causal=false": () if self.causal else layers}
        both_ways[f"encoder_layers={self.encoder_layers}"] = self.encoder_specs()
        for key, specs in both_ways.items():
            if (other := next((spec for spec in specs if spec.stateful), None)) is not None:
                raise ValueError(
                    f"model.{key} needs attention in every layer; layer {other.index} is {other.mixer.name}, which "
                    f"keeps a state of what came before"
                )

    def _check_ssm(self) -> None:
        """Raises ValueError where channels, heads and groups do not divide each other."""
        if self.ssm is None:
            return
        inner, heads = self.ssm.widths(self.dim)
        if inner % self.ssm.head_width:
            raise ValueError(
                f"model.ssm.head_width={self.ssm.head_width} does not divide the {inner} channels, expand x model.dim"
            )
        if heads % self.ssm.groups:
            raise ValueError(f"model.ssm.groups={self.ssm.groups} does not divide the {heads} heads")

    def _check_encoder(self) -> None:
        """Raises ValueError where an encoder does not go with other keys."""
        if self.encoder_layers and self.parallel_residual:
            raise ValueError(
                f"model.encoder_layers={self.encoder_layers}: layers that attend to a memory have it between attention "
                f"and feed-forward, which model.parallel_residual=true computes side by side; leave one of them out"
            )
        if self.encoder_layers and self.vision is not None:
            raise ValueError(
                f"model.encoder_layers={self.encoder_layers} with model.vision: images stand among the tokens of a "
                f"model without an encoder; leave one of them out"
            )

    def _check_thresholds(self) -> None:
        """Raises ValueError where they are not one for each routed layer."""
        if self.route is None or self.route.thresholds is None:
            return
        count = sum(spec.mixer.name == "routed" for spec in self.layer_specs())
        if len(self.route.thresholds) != count:
            given = len(self.route.thresholds)
            raise ValueError(f"model.route.thresholds: there are {count} routed layers, not {given}")

    def _check_positions(self) -> None:
        """Raises ValueError where heads cannot be rotated, or keys of rotations are given to a model without them."""
        if not POSITIONS[self.pos].rotates:
            given = [key for key in ("rope_scaling", "nope_layer_interval") if getattr(self, key) is not None]
            given += ["qk_norm=l2"] if self.qk_norm == "l2" else []
            if given:
                raise ValueError(f"model.{given[0]} is of models with model.pos=rope; got {self.pos}")
            return
        if self.rotated_width % 2 or self.rotated_width == 0:
            part = "" if self.rope_pct == 1 else f" and model.rope_pct={self.rope_pct} rotate {self.rotated_width}"
            raise ValueError(
                f"model.head_dim={self.head_width}{part}: RoPE rotates pairs, so the rotated width must be even and "
                f"at least 2"
            )
        if self.rope_scaling is not None and self.rope_scaling.kind == "dynamic" and self.rotated_width < 4:
            raise ValueError("model.rope_scaling.kind=dynamic needs at least 4 rotated elements of a head")

    def _check_scaling(self) -> None:
        """Raises ValueError where labels are scaled and are no values, or names and scales are not as many."""
        names = self.prediction_names
        if names is not None and len(set(names)) != self.n_prediction:
            raise ValueError(
                f"model.prediction_names={list(names)}: there must be a name for each of the model.n_prediction="
                f"{self.n_prediction} outputs, no two the same"
            )
        for key, numbers in (("mean", self.prediction_mean), ("std", self.prediction_std)):
            if numbers is None:
                continue
            given = f"model.prediction_{key}={list(numbers)}"
            if self.prediction != "regression" or len(numbers) != self.n_prediction:
                raise ValueError(
                    f"{given}: there must be one number for each of the model.n_prediction={self.n_prediction} values "
                    f"of a regression; model.prediction={self.prediction}"
                )
            if not all(math.isfinite(number) for number in numbers) or (key == "std" and min(numbers) <= 0):
                raise ValueError(f"{given}: numbers must be finite{', and above 0' if key == 'std' else ''}")

    @property
    def has_final_norm(self) -> bool:
        """Whether there is a norm after the last layer: not where that ends with one."""
        return self.norm_place != "post_add"

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads, resolved."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_width(self) -> int:
        """Width of one head, resolved."""
        return self.dim // self.n_heads if self.head_dim is None else self.head_dim

    @property
    def rotated_width(self) -> int:
        """How much of a head RoPE rotates."""
        return int(self.head_width * self.rope_pct)

    @property
    def merged(self) -> "ModelArgs":
        """The model that results when adapters are added to their weights."""
        return self if self.lora is None else self.model_copy(update={"lora": None})

    @property
    def drops(self) -> bool:
        """Whether training drops anything, of adapters' inputs too."""
        rates = self.attn_dropout, self.resid_dropout, self.embed_dropout, self.ffn_dropout, self.head_dropout
        return any(rates) or (self.lora is not None and self.lora.dropout > 0)

    def ffn_width(self) -> int:
        """Hidden width of a dense feed-forward: `ffn_hidden`, else Llama's rule int(2 * 4 dim / 3)."""
        return self._rule_width(4 * self.dim) if self.ffn_hidden is None else self.ffn_hidden

    def moe_width(self) -> int:
        """Hidden width of an expert: `moe.hidden`, else Llama 4's rule, which starts from int(ffn_exp * dim)."""
        if self.moe is not None and self.moe.hidden is not None:
            return self.moe.hidden
        return self._rule_width(int(self.ffn_exp * self.dim))

    def _rule_width(self, expanded: int) -> int:
        width = int(2 * expanded / 3)
        if self.ffn_dim_multiplier is not None:
            width = int(self.ffn_dim_multiplier * width)
        return -(-width // self.multiple_of) * self.multiple_of

    def layer_specs(self) -> tuple[LayerSpec, ...]:
        """The layers, resolved: the pattern tiled over n_layers, unwritten parts filled by the rules of Llama 4. Where
        there is an encoder, they are the decoder's."""
        return self._specs(self.n_layers, cross=self.encoder_layers > 0)

    def encoder_specs(self) -> tuple[LayerSpec, ...]:
        """The encoder's layers, by the same rules and the same pattern; none without an encoder."""
        return self._specs(self.encoder_layers, encoder=True)

    def all_specs(self) -> tuple[LayerSpec, ...]:
        """The layers in the order in which vectors pass them: the encoder's, and the others."""
        return (*self.encoder_specs(), *self.layer_specs())

    def _specs(self, count: int, cross: bool = False, encoder: bool = False) -> tuple[LayerSpec, ...]:
        pattern = ["attn"] if self.layer_pattern is None else self.layer_pattern
        if isinstance(pattern, str):
            pattern = PATTERN_ALIASES.get(pattern) or [item.strip() for item in pattern.split(",")]
        if not pattern:
            raise ValueError("model.layer_pattern is empty; leave it out, or give items like attn:chunk+moe")
        items = ((index, pattern[index % len(pattern)]) for index in range(count))
        return tuple(replace(self._resolve(*item), cross=cross, encoder=encoder) for item in items)

    def _resolve(self, index: int, text: str) -> LayerSpec:
        item = parse_item(text, index)
        ffn = item.ffn
        if ffn is None:
            on = self.moe is not None and (index + 1) % self.moe.interleave == 0 and index not in self.moe.dense_layers
            ffn = "moe" if on else "dense"
        elif ffn == "moe" and self.moe is None:
            refuse(text, "+moe needs the group model.moe (at least n_experts)")
        return LayerSpec(
            index=index,
            mixer=MIXERS[item.mixer].resolve(self, item),
            ffn=ffn,
            norms=NormsSpec(
                before=self.norm_place in ("pre", "sandwich"),
                after=self.norm_place != "pre",
                of_sum=self.norm_place == "post_add",
            ),
            parallel=self.parallel_residual,
        )


def same_head(one: ModelArgs, other: ModelArgs) -> bool:
    """Whether the prediction heads of two models predict the same, as far as their outputs have names."""
    if (one.prediction, one.n_prediction) != (other.prediction, other.n_prediction):
        return False
    return one.prediction_names == other.prediction_names or None in (one.prediction_names, other.prediction_names)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
