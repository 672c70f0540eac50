"""Qwen 2 (biases on queries, keys and values), Qwen 3 (norms of heads before RoPE) and Qwen 3 MoE."""

from typing import Any

from llm.args import ModelArgs
from llm.args.layers import attention_specs
from llm.foreign import hf
from llm.foreign.families.llama import BLOCK, CONTAINERS, ROWS
from llm.foreign.family import Family, Warn

QWEN2: dict[str, Any] = {
    "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
}  # fmt: skip
QWEN3 = QWEN2 | {"head_dim": 128}
QWEN3_MOE = QWEN2 | {
    "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24, "num_key_value_heads": 4,
    "num_experts_per_tok": 8, "moe_intermediate_size": 768, "decoder_sparse_step": 1,
}  # fmt: skip
"""What transformers takes for keys that a config leaves out."""


def read_qwen2(config: hf.Config, warn: Warn) -> dict[str, Any]:
    config = hf.with_defaults(config, QWEN2, warn)
    return hf.common_args(config, warn, by_layer=True) | {"qkv_bias": True, **hf.qwen_windows(config, warn)}


def read_qwen3(config: hf.Config, warn: Warn) -> dict[str, Any]:
    config = hf.with_defaults(config, QWEN3, warn)
    biased = bool(config.get("attention_bias"))
    common = hf.common_args(config, warn, by_layer=True)
    common |= {"qkv_bias": biased, "o_bias": biased, "qk_norm": "head"}
    return common | hf.qwen_windows(config, warn)


def read_qwen3_moe(config: hf.Config, warn: Warn) -> dict[str, Any]:
    config = hf.with_defaults(config, QWEN3_MOE, warn)
    biased, window = bool(config.get("attention_bias")), config.get("sliding_window")
    experts = hf.one_of(config, ("num_experts", "num_local_experts"), warn)
    n_layers = config["num_hidden_layers"]
    hf.silu_experts(config)
    return hf.common_args(config, warn) | {
        "qkv_bias": biased,
        "o_bias": biased,
        "qk_norm": "head",
        "sliding_window": window if config.get("use_sliding_window") else None,
        "moe": {
            "n_experts": 128 if experts is None else experts,
            "top_k": config["num_experts_per_tok"],
            "hidden": config["moe_intermediate_size"],
            "interleave": config["decoder_sparse_step"],
            "dense_layers": [i for i in config.get("mlp_only_layers") or () if i < n_layers],
            "score": "softmax",
            "renorm": bool(config.get("norm_topk_prob")),
            "apply": "output",
            "shared": False,
        },
    }


def write_windows(args: ModelArgs) -> dict[str, Any]:
    specs = args.layer_specs()
    windowed = [spec.mask == "window" for spec in attention_specs(specs)]
    first = windowed.index(True) if any(windowed) else args.n_layers
    return {
        "use_sliding_window": any(windowed),
        "sliding_window": args.sliding_window if any(windowed) else None,
        "max_window_layers": first,
        "layer_types": hf.layer_types(specs),
    }


def write_qwen2(args: ModelArgs) -> dict[str, Any]:
    return hf.write_common(args, "Qwen2ForCausalLM", "qwen2") | write_windows(args)


def write_qwen3(args: ModelArgs) -> dict[str, Any]:
    common = hf.write_common(args, "Qwen3ForCausalLM", "qwen3")
    return common | {"attention_bias": args.qkv_bias, **write_windows(args)}


def write_qwen3_moe(args: ModelArgs) -> dict[str, Any]:
    common = hf.write_common(args, "Qwen3MoeForCausalLM", "qwen3_moe")
    window = hf.all_windowed(args)
    written = common | {"attention_bias": args.qkv_bias, "use_sliding_window": window is not None}
    written["sliding_window"] = window
    moe = args.moe
    if moe is None:
        return written
    return written | {
        "num_experts": moe.n_experts,
        "num_local_experts": moe.n_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": args.moe_width(),
        "decoder_sparse_step": moe.interleave,
        "mlp_only_layers": list(moe.dense_layers),
        "norm_topk_prob": moe.renorm,
    }


MOE_ROWS = (*ROWS, *hf.experts(f"{BLOCK}.mlp", "gate_proj", "up_proj", "down_proj"))
OF_WINDOWS = ("max_window_layers",)
"""Says nothing where no window is in use."""
FAMILIES = (
    Family("qwen2", ROWS, read_qwen2, write_qwen2, CONTAINERS, silent=OF_WINDOWS, architecture="Qwen2ForCausalLM"),
    Family("qwen3", ROWS, read_qwen3, write_qwen3, CONTAINERS, silent=OF_WINDOWS, architecture="Qwen3ForCausalLM"),
    Family(
        "qwen3_moe", MOE_ROWS, read_qwen3_moe, write_qwen3_moe, CONTAINERS, silent=OF_WINDOWS,
        architecture="Qwen3MoeForCausalLM",
    ),
)  # fmt: skip
