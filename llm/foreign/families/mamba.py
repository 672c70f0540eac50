"""Mamba-2 as Hugging Face writes it, and Bamba, whose layers are state-space or attention, each with a feed-forward."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from llm.args import ModelArgs, SSMArgs
from llm.errors import UserError
from llm.foreign import hf
from llm.foreign.families.llama import BLOCK
from llm.foreign.family import Family, Row, Warn, row

MAMBA2: dict[str, Any] = {
    "vocab_size": 32768, "hidden_size": 4096, "num_hidden_layers": 64, "state_size": 128, "expand": 2,
    "conv_kernel": 4, "n_groups": 8, "num_heads": 128, "head_dim": 64, "layer_norm_epsilon": 1e-5, "use_bias": False,
    "use_conv_bias": True, "chunk_size": 256, "time_step_limit": (0.0, math.inf), "initializer_range": 0.1,
}  # fmt: skip
BAMBA: dict[str, Any] = {
    "vocab_size": 128000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 262144,
    "mamba_n_heads": 128, "mamba_d_head": "auto", "mamba_n_groups": 1, "mamba_d_state": 256, "mamba_d_conv": 4,
    "mamba_expand": 2, "mamba_chunk_size": 256, "mamba_conv_bias": True, "mamba_proj_bias": False,
    "time_step_limit": (0.0, math.inf),
}  # fmt: skip
"""What transformers takes for keys that a config leaves out."""
LENGTH = 2048
"""Of a model that has no longest text: what it is trained on unless it is said."""
PARTIAL = 0.5
"""Of a head of Bamba's that is rotated, where the config does not say."""


def mixer(path: str, ours: str = "layers.{i}.attention") -> Iterator[Row]:
    """Rows of a state-space mixer at `path`, whose first matrix is ours one after the other."""
    parts = (f"{ours}.{name}.weight" for name in ("wz", "wx", "wbc", "wdt"))
    yield row(f"{path}.in_proj.weight", *parts, transform="rows", bias=True)
    taps = f"{ours}.conv_x", f"{ours}.conv_bc"
    yield row(f"{path}.conv1d.weight", *(f"{name}.weight" for name in taps), transform="rows")
    yield row(f"{path}.conv1d.bias", *(f"{name}.bias" for name in taps), transform="rows")
    for name in ("A_log", "D", "dt_bias"):
        yield row(f"{path}.{name}", f"{ours}.{name}")
    yield row(f"{path}.norm.weight", f"{ours}.norm.weight")
    yield row(f"{path}.out_proj.weight", f"{ours}.wo.weight", bias=True)


def limits(config: hf.Config) -> tuple[float, float | None]:
    """Of the time step; a number without bound may be written as JSON has it, or as transformers does."""
    low, high = (_number(value) for value in config["time_step_limit"])
    return low, None if math.isinf(high) else high


def _number(value: Any) -> float:
    return float(value["__float__"] if isinstance(value, dict) else value)


def _channels(config: hf.Config, heads: str, width: str, expand: str) -> int:
    """Width of a head. UserError where heads and width are not the channels."""
    channels = config[expand] * config["hidden_size"]
    found = channels // config[heads] if config[width] == "auto" else int(config[width])
    if config[heads] * found != channels:
        raise UserError(
            f"config.json: {heads}={config[heads]} heads of {width}={found} are not the {channels} channels, "
            f"{expand} x hidden_size"
        )
    return found


def _silu(config: hf.Config) -> None:
    """UserError where the activation, which is that after the convolutions too, is another one."""
    if hf.activation(config) != "silu":
        raise UserError(f"config.json: hidden_act={config['hidden_act']} is not supported; only silu is")


def read_mamba2(config: hf.Config, warn: Warn) -> dict[str, Any]:
    config = hf.with_defaults(config, MAMBA2, warn)
    _silu(config)
    return {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "n_heads": 1,
        "vocab_size": config["vocab_size"],
        "max_seq_len": LENGTH,
        "norm_eps": config["layer_norm_epsilon"],
        "tie_embeddings": bool(config.get("tie_word_embeddings")),
        "init_std": config["initializer_range"],
        "layer_pattern": ["ssm+none"],
        "pos": "none",
        "ssm": {
            "d_state": config["state_size"],
            "d_conv": config["conv_kernel"],
            "expand": config["expand"],
            "head_width": _channels(config, "num_heads", "head_dim", "expand"),
            "groups": config["n_groups"],
            "chunk": config["chunk_size"],
            "dt_limit": limits(config),
            "bias": bool(config["use_bias"]),
            "conv_bias": bool(config["use_conv_bias"]),
        },
    }


def read_bamba(config: hf.Config, warn: Warn) -> dict[str, Any]:
    config = hf.with_defaults(config, BAMBA, warn)
    _silu(config)
    biased, n_layers = bool(config.get("attention_bias")), config["num_hidden_layers"]
    attends = set(config.get("attn_layer_indices") or ())
    if other := sorted(index for index in attends if not 0 <= index < n_layers):
        raise UserError(f"config.json: attn_layer_indices: {other[0]} is not one of {n_layers} layers")
    return hf.common_args(config, warn, partial=PARTIAL) | {
        "qkv_bias": biased,
        "o_bias": biased,
        "ffn_bias": bool(config.get("mlp_bias")),
        "layer_pattern": ["attn" if index in attends else "ssm" for index in range(n_layers)],
        "ssm": {
            "d_state": config["mamba_d_state"],
            "d_conv": config["mamba_d_conv"],
            "expand": config["mamba_expand"],
            "head_width": _channels(config, "mamba_n_heads", "mamba_d_head", "mamba_expand"),
            "groups": config["mamba_n_groups"],
            "chunk": config["mamba_chunk_size"],
            "dt_limit": limits(config),
            "bias": bool(config["mamba_proj_bias"]),
            "conv_bias": bool(config["mamba_conv_bias"]),
        },
    }


def _ssm(args: ModelArgs, family: str) -> SSMArgs:
    """Of a model that a family can express. UserError for one that has other layers."""
    kinds = {(spec.mixer.name, spec.stride, spec.ffn) for spec in args.layer_specs()}
    allowed = {("ssm", 1, "none")} if family == "mamba2" else {("ssm", 1, "dense"), ("attn", 1, "dense")}
    if args.act != "silu":
        raise UserError(f"a {family} config cannot say model.act={args.act}, as its mixers would have it too")
    if args.moe is not None:
        raise UserError(f"a {family} config cannot say model.moe")
    if args.ssm is None or not kinds <= allowed:
        raise UserError(f"a {family} config cannot say model.layer_pattern={args.layer_pattern}")
    return args.ssm


def _written_limits(ssm: SSMArgs) -> list[float]:
    low, high = ssm.dt_limit
    return [low, math.inf if high is None else high]


def write_mamba2(args: ModelArgs) -> dict[str, Any]:
    ssm = _ssm(args, "mamba2")
    return {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        "vocab_size": args.vocab_size,
        "hidden_size": args.dim,
        "num_hidden_layers": args.n_layers,
        "state_size": ssm.d_state,
        "expand": ssm.expand,
        "conv_kernel": ssm.d_conv,
        "n_groups": ssm.groups,
        "num_heads": ssm.widths(args.dim)[1],
        "head_dim": ssm.head_width,
        "chunk_size": ssm.chunk,
        "layer_norm_epsilon": args.norm_eps,
        "use_bias": ssm.bias,
        "use_conv_bias": ssm.conv_bias,
        "hidden_act": "silu",
        "time_step_limit": _written_limits(ssm),
        "tie_word_embeddings": args.tie_embeddings,
        "initializer_range": args.init_std,
    }


def write_bamba(args: ModelArgs) -> dict[str, Any]:
    ssm = _ssm(args, "bamba")
    specs, common = args.layer_specs(), hf.write_common(args, "BambaForCausalLM", "bamba")
    common["rope_parameters"] |= {"partial_rotary_factor": args.rope_pct}  # also 1, which is not what is taken without
    return common | {
        "attention_bias": args.qkv_bias,
        "mlp_bias": args.ffn_bias,
        "attn_layer_indices": [spec.index for spec in specs if spec.mixer.name == "attn"],
        "partial_rotary_factor": args.rope_pct,
        "mamba_n_heads": ssm.widths(args.dim)[1],
        "mamba_d_head": ssm.head_width,
        "mamba_n_groups": ssm.groups,
        "mamba_d_state": ssm.d_state,
        "mamba_d_conv": ssm.d_conv,
        "mamba_expand": ssm.expand,
        "mamba_chunk_size": ssm.chunk,
        "mamba_conv_bias": ssm.conv_bias,
        "mamba_proj_bias": ssm.bias,
        "time_step_limit": _written_limits(ssm),
    }


LAYER = "backbone.layers.{i}"
MAMBA2_ROWS = (
    *hf.ends("backbone.embeddings", "backbone.norm_f", "lm_head"),
    *hf.norms(LAYER, attention_norm="norm"),
    *mixer(f"{LAYER}.mixer"),
)
BAMBA_ROWS = (
    *hf.ends("model.embed_tokens", "model.final_layernorm", "lm_head"),
    *(replace(entry, mixer="attn") for entry in hf.attention(f"{BLOCK}.self_attn")),
    *(replace(entry, mixer="ssm") for entry in mixer(f"{BLOCK}.mamba")),
    *hf.feed_forward(f"{BLOCK}.feed_forward"),
    *hf.norms(BLOCK, attention_norm="input_layernorm", ffn_norm="pre_ff_layernorm"),
)
OF_INIT = (
    "rescale_prenorm_residual", "residual_in_fp32", "time_step_rank", "time_step_min", "time_step_max",
    "time_step_floor", "rms_norm",
)  # fmt: skip
"""Of initial values and of rounding; the norm is an RMS norm in transformers whatever rms_norm says."""
FAMILIES = (
    Family("mamba2", MAMBA2_ROWS, read_mamba2, write_mamba2, hf.containers(LAYER, "mixer", "mlp"), silent=OF_INIT,
           architecture="Mamba2ForCausalLM"),
    Family("bamba", BAMBA_ROWS, read_bamba, write_bamba, hf.containers(BLOCK, "self_attn", "feed_forward"),
           architecture="BambaForCausalLM"),
)  # fmt: skip
