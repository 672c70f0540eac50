"""Llama 2, 3, 3.1 and 3.2 as Hugging Face writes them, and Mistral, which differs in its window only."""

from typing import Any

from llm.args import ModelArgs
from llm.foreign import hf
from llm.foreign.family import Family, Warn

BLOCK = "model.layers.{i}"
ROWS = (
    *hf.ends("model.embed_tokens", "model.norm", "lm_head"),
    *hf.attention(f"{BLOCK}.self_attn"),
    *hf.feed_forward(f"{BLOCK}.mlp"),
    *hf.norms(BLOCK, attention_norm="input_layernorm", ffn_norm="post_attention_layernorm"),
)
CONTAINERS = hf.containers(BLOCK, "self_attn", "mlp")


LLAMA: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
}  # fmt: skip
MISTRAL = LLAMA | {
    "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096,
}  # fmt: skip
"""What transformers takes for keys that a config leaves out."""


def read_llama(config: hf.Config, warn: Warn) -> dict[str, Any]:
    config = hf.with_defaults(config, LLAMA, warn)
    biased = bool(config.get("attention_bias"))
    return hf.common_args(config, warn) | {
        "qkv_bias": biased,
        "o_bias": biased,
        "ffn_bias": bool(config.get("mlp_bias")),
    }


def write_llama(args: ModelArgs) -> dict[str, Any]:
    common = hf.write_common(args, "LlamaForCausalLM", "llama")
    return common | {"attention_bias": args.qkv_bias, "mlp_bias": args.ffn_bias}


def read_mistral(config: hf.Config, warn: Warn) -> dict[str, Any]:
    config = hf.with_defaults(config, MISTRAL, warn)
    return hf.common_args(config, warn) | {"sliding_window": config.get("sliding_window")}


def write_mistral(args: ModelArgs) -> dict[str, Any]:
    return hf.write_common(args, "MistralForCausalLM", "mistral") | {"sliding_window": hf.all_windowed(args)}


FAMILIES = (
    Family("llama", ROWS, read_llama, write_llama, CONTAINERS, architecture="LlamaForCausalLM"),
    Family("mistral", ROWS, read_mistral, write_mistral, CONTAINERS, architecture="MistralForCausalLM"),
)
