"""OLMo 2: norms after attention and feed-forward, and of all queries and all keys of a token as one."""

from typing import Any

from llm.args import ModelArgs
from llm.foreign import hf
from llm.foreign.families.llama import BLOCK, CONTAINERS, LLAMA
from llm.foreign.family import Family, Warn

ROWS = (
    *hf.ends("model.embed_tokens", "model.norm", "lm_head"),
    *hf.attention(f"{BLOCK}.self_attn"),
    *hf.feed_forward(f"{BLOCK}.mlp"),
    *hf.norms(BLOCK, attention_post_norm="post_attention_layernorm", ffn_post_norm="post_feedforward_layernorm"),
)


DEFAULTS = LLAMA | {"vocab_size": 50304, "rms_norm_eps": 1e-5}
"""What transformers takes for keys that a config leaves out."""


def read_config(config: hf.Config, warn: Warn) -> dict[str, Any]:
    config = hf.with_defaults(config, DEFAULTS, warn)
    biased = bool(config.get("attention_bias"))
    return hf.common_args(config, warn) | {
        "qkv_bias": biased,
        "o_bias": biased,
        "qk_norm": "full",
        "norm_place": "post",
        "norm_fp32_weight": True,
    }


def write_config(args: ModelArgs) -> dict[str, Any]:
    return hf.write_common(args, "Olmo2ForCausalLM", "olmo2") | {"attention_bias": args.qkv_bias}


FAMILIES = (Family("olmo2", ROWS, read_config, write_config, CONTAINERS, architecture="Olmo2ForCausalLM"),)
