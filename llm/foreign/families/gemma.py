"""Gemma (norms of 1 + weight, scaled token vectors, tied) and Gemma 2 (norms on both sides, caps, a window in every
other layer).
"""

from typing import Any

from llm.args import ModelArgs
from llm.errors import UserError
from llm.foreign import hf
from llm.foreign.families.llama import BLOCK, CONTAINERS, ROWS
from llm.foreign.family import Family, Warn

GEMMA2_ROWS = (
    *hf.ends("model.embed_tokens", "model.norm", "lm_head"),
    *hf.attention(f"{BLOCK}.self_attn"),
    *hf.feed_forward(f"{BLOCK}.mlp"),
    *hf.norms(
        BLOCK,
        attention_norm="input_layernorm",
        attention_post_norm="post_attention_layernorm",
        ffn_norm="pre_feedforward_layernorm",
        ffn_post_norm="post_feedforward_layernorm",
    ),
)


GEMMA: dict[str, Any] = {
    "vocab_size": 256000, "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh",
}  # fmt: skip
GEMMA2 = GEMMA | {
    "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
    "num_key_value_heads": 4, "sliding_window": 4096, "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0, "hidden_activation": "gelu_pytorch_tanh",
}  # fmt: skip
"""What transformers takes for keys that a config leaves out."""


def read_common(config: hf.Config, warn: Warn, by_layer: bool) -> dict[str, Any]:
    if config.get("use_bidirectional_attention"):
        raise UserError("config.json: use_bidirectional_attention is not supported")
    biased = bool(config.get("attention_bias"))
    return hf.common_args(config, warn, by_layer=by_layer) | {
        "qkv_bias": biased,
        "o_bias": biased,
        "norm_offset": True,
        "embed_scale": required_width(config) ** 0.5,
    }


def required_width(config: hf.Config) -> int:
    return int(hf.required(config, "hidden_size"))


def read_gemma(config: hf.Config, warn: Warn) -> dict[str, Any]:
    config, beside = hf.with_defaults(config, GEMMA, warn), config.get("hidden_activation")
    act = config["hidden_act"] or GEMMA["hidden_act"]
    if act == "gelu":
        warn("config.json: hidden_act=gelu, as early Gemma files say, stands for the tanh approximation")
        act = "gelu_pytorch_tanh"
    if beside not in (None, act):
        warn(f"config.json: hidden_act={act} and hidden_activation={beside} contradict each other; the first is used")
    return read_common(config, warn, False) | {"act": hf.activation({"hidden_act": act})}


def read_gemma2(config: hf.Config, warn: Warn) -> dict[str, Any]:
    config = hf.with_defaults(config, GEMMA2, warn)
    n_layers, window = config["num_hidden_layers"], config["sliding_window"]
    stated = hf.layer_kinds(config, "sliding_attention", "full_attention")
    windowed = [i % 2 == 0 for i in range(n_layers)] if stated is None else stated
    act = {"hidden_act": config["hidden_activation"] or GEMMA2["hidden_activation"]}
    return read_common(config, warn, True) | {
        "act": hf.activation(act),
        "norm_place": "sandwich",
        "score_scale": hf.required(config, "query_pre_attn_scalar") ** -0.5,
        "attn_softcap": config["attn_logit_softcapping"],
        "logit_softcap": config["final_logit_softcapping"],
        **hf.pattern(windowed, window),
    }


def write_gemma(args: ModelArgs) -> dict[str, Any]:
    return hf.write_common(args, "GemmaForCausalLM", "gemma") | {"attention_bias": args.qkv_bias}


def write_gemma2(args: ModelArgs) -> dict[str, Any]:
    written = hf.write_common(args, "Gemma2ForCausalLM", "gemma2")
    scale = args.head_width**-0.5 if args.score_scale is None else args.score_scale
    return written | {
        "attention_bias": args.qkv_bias,
        "hidden_activation": written.pop("hidden_act"),
        "query_pre_attn_scalar": max(1, round(scale**-2)),  # transformers wants a whole number
        "attn_logit_softcapping": args.attn_softcap,
        "final_logit_softcapping": args.logit_softcap,
        "sliding_window": args.sliding_window or args.max_seq_len,
        "layer_types": hf.layer_types(args.layer_specs()),
    }


FAMILIES = (
    Family("gemma", ROWS, read_gemma, write_gemma, CONTAINERS, architecture="GemmaForCausalLM"),
    Family(
        "gemma2", GEMMA2_ROWS, read_gemma2, write_gemma2, CONTAINERS,
        silent=("sliding_window_size",),  # of the first files, and of no code
        architecture="Gemma2ForCausalLM",
    ),
)
