"""Falcon-H1 as Hugging Face writes it (Zuo et al. 2025, arXiv:2507.22448): in every layer a state-space mixer and
attention side by side, and a feed-forward. Read alone: no config of ours is written as one.

Its factors stay what they are, keys of the model beside the weights, so that weights are those of the files bit for bit
and go on being trained in their scale.
"""

from typing import Any

from llm.errors import UserError
from llm.foreign import hf
from llm.foreign.asked import with_values
from llm.foreign.families.llama import BLOCK
from llm.foreign.families.mamba import limits, mixer
from llm.foreign.family import Family, Warn

DEFAULTS: dict[str, Any] = {
    "vocab_size": 128000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192,
    "mamba_d_ssm": 1024, "mamba_n_heads": 128, "mamba_d_head": "auto", "mamba_n_groups": 1, "mamba_d_state": 256,
    "mamba_d_conv": 4, "mamba_expand": 2, "mamba_chunk_size": 256, "mamba_conv_bias": True, "mamba_proj_bias": False,
    "mamba_norm_before_gate": True, "mamba_rms_norm": False, "projectors_bias": False,
    "time_step_limit": (0.0, float("inf")), "mlp_multipliers": (1.0, 1.0), "ssm_multipliers": (1.0,) * 5,
    **dict.fromkeys(("lm_head_multiplier", "embedding_multiplier", "key_multiplier", "attention_out_multiplier",
                     "attention_in_multiplier", "ssm_in_multiplier", "ssm_out_multiplier"), 1.0),
}  # fmt: skip
"""What transformers takes for keys that a config leaves out."""


def read_config(config: hf.Config, warn: Warn) -> dict[str, Any]:
    given = {key: value for key, value in config.items() if value is not None or key not in DEFAULTS}
    given |= {"mamba_d_ssm": None} if "mamba_d_ssm" in config and config["mamba_d_ssm"] is None else {}
    if "num_key_value_heads" in config and config["num_key_value_heads"] is None:  # as many as there are heads
        given["num_key_value_heads"] = given.get("num_attention_heads", DEFAULTS["num_attention_heads"])
    config = hf.with_defaults(with_values(config, given), DEFAULTS, warn)
    if hf.activation(config) != "silu":
        raise UserError(f"config.json: hidden_act={config['hidden_act']} is not supported; only silu is")
    if bool(config["mamba_proj_bias"]) != bool(config["projectors_bias"]):
        raise UserError(
            f"config.json: mamba_proj_bias={config['mamba_proj_bias']} and projectors_bias="
            f"{config['projectors_bias']}: a mixer's linear layers have biases all, or none"
        )
    expanded = config["mamba_expand"] * config["hidden_size"]
    channels = expanded if config["mamba_d_ssm"] is None else config["mamba_d_ssm"]
    heads, width = config["mamba_n_heads"], config["mamba_d_head"]
    width = channels // heads if width == "auto" else int(width)
    if heads * width != channels:
        raise UserError(
            f"config.json: mamba_n_heads={heads} heads of mamba_d_head={width} are not the {channels} channels"
        )
    norm = "before_gate" if config["mamba_norm_before_gate"] else "after_gate"
    biased, common = bool(config.get("attention_bias")), hf.common_args(config, warn)
    head_width = common["head_dim"] or config["hidden_size"] // config["num_attention_heads"]
    factors = tuple(config["ssm_multipliers"])
    return common | {
        "qkv_bias": biased,
        "o_bias": biased,
        "ffn_bias": bool(config.get("mlp_bias")),
        "layer_pattern": ["sum"],
        "embed_scale": _factor(config["embedding_multiplier"]),
        "logit_scale": _factor(config["lm_head_multiplier"]),
        "score_scale": None if config["key_multiplier"] == 1 else config["key_multiplier"] * head_width**-0.5,
        "ffn_scales": _factors(config["mlp_multipliers"]),
        "sum": {
            "attn": (config["attention_in_multiplier"], config["attention_out_multiplier"]),
            "ssm": (config["ssm_in_multiplier"], config["ssm_out_multiplier"]),
        },
        "ssm": {
            "d_state": config["mamba_d_state"],
            "d_conv": config["mamba_d_conv"],
            "expand": config["mamba_expand"],
            "head_width": width,
            "heads": None if channels == expanded else heads,
            "groups": config["mamba_n_groups"],
            "chunk": config["mamba_chunk_size"],
            "dt_limit": limits(config),
            "bias": bool(config["mamba_proj_bias"]),
            "conv_bias": bool(config["mamba_conv_bias"]),
            "norm": norm if config["mamba_rms_norm"] else "none",
            "scales": _factors(factors),
        },
    }


def _factor(value: float) -> float | None:
    return None if value == 1 else value


def _factors(values: Any) -> tuple[float, ...] | None:
    return None if all(value == 1 for value in values) else tuple(values)


MIXERS = "layers.{i}.attention"
ROWS = (
    *hf.ends("model.embed_tokens", "model.final_layernorm", "lm_head"),
    *mixer(f"{BLOCK}.mamba", f"{MIXERS}.ssm"),
    *hf.attention(f"{BLOCK}.self_attn", f"{MIXERS}.attn"),
    *hf.feed_forward(f"{BLOCK}.feed_forward"),
    *hf.norms(BLOCK, attention_norm="input_layernorm", ffn_norm="pre_ff_layernorm"),
)
CONTAINERS = {"": "", "layers.{i}.": f"{BLOCK}.", "layers.{i}.feed_forward.": f"{BLOCK}.feed_forward."}
FAMILIES = (Family("falcon_h1", ROWS, read_config, None, CONTAINERS, architecture="FalconH1ForCausalLM"),)
