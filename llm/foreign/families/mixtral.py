"""Mixtral: Mistral's attention, and in every layer experts whose results are weighted by the softmax of the chosen."""

from typing import Any

from llm.args import ModelArgs
from llm.foreign import hf
from llm.foreign.families.llama import BLOCK, MISTRAL, ROWS
from llm.foreign.family import Family, Warn

DEFAULTS = MISTRAL | {"rms_norm_eps": 1e-5, "sliding_window": None, "num_experts_per_tok": 2}
"""What transformers takes for keys that a config leaves out."""


def read_config(config: hf.Config, warn: Warn) -> dict[str, Any]:
    config = hf.with_defaults(config, DEFAULTS, warn)
    hf.silu_experts(config)
    experts = hf.one_of(config, ("num_local_experts", "num_experts"), warn)
    return hf.common_args(config, warn, theta=1e6) | {
        "sliding_window": config.get("sliding_window"),
        "ffn_hidden": None,
        "moe": {
            "n_experts": 8 if experts is None else experts,
            "top_k": config["num_experts_per_tok"],
            "hidden": config.get("intermediate_size"),
            "score": "softmax",
            "renorm": True,
            "apply": "output",
            "shared": False,
        },
    }


def write_config(args: ModelArgs) -> dict[str, Any]:
    written = hf.write_common(args, "MixtralForCausalLM", "mixtral") | {"sliding_window": hf.all_windowed(args)}
    if args.moe is not None:
        written |= {"num_local_experts": args.moe.n_experts, "num_experts_per_tok": args.moe.top_k}
        written["intermediate_size"] = args.moe_width()
    return written


TABLE = (*ROWS, *hf.experts(f"{BLOCK}.block_sparse_moe", "w1", "w3", "w2"))
CONTAINERS = hf.containers(BLOCK, "self_attn", "block_sparse_moe")
FAMILIES = (Family("mixtral", TABLE, read_config, write_config, CONTAINERS, architecture="MixtralForCausalLM"),)
