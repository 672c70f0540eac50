"""The text model of Llama 4 as Meta writes it: fused projections with norms hidden inside, experts as flat matrices."""

from typing import Any

from llm.foreign import hf
from llm.foreign.families.meta_llama import read_config as read_llama
from llm.foreign.family import Family, Warn, row

OURS = "layers.{i}"
FFN = f"{OURS}.feed_forward"
QKV = (f"{OURS}.attention.wq.weight", f"{OURS}.attention.wk.weight", f"{OURS}.attention.wv.weight")
VISION = (r"vision_embeddings\..*", r"vision_projection\..*")
ROWS = (
    *(row(f"{name}.weight", f"{name}.weight") for name in ("tok_embeddings", "norm", "output")),
    row(f"{OURS}.attention.wqkv.weight", *QKV, transform="rows"),
    *(row(name, name) for name in QKV),
    row(f"{OURS}.attention.wo.weight", f"{OURS}.attention.wo.weight"),
    row(f"{OURS}.attention.wqkv.layer_norm_weight", f"{OURS}.attention_norm.weight"),
    row(f"{OURS}.attention_norm.weight", f"{OURS}.attention_norm.weight"),
    row(f"{FFN}.norm.weight", f"{OURS}.ffn_norm.weight"),
    row(f"{FFN}.mlp.layer_norm_weight", f"{OURS}.ffn_norm.weight"),
    row(f"{OURS}.ffn_norm.weight", f"{OURS}.ffn_norm.weight"),
    row(f"{FFN}.mlp.fc1_weight", f"{FFN}.w1.weight", f"{FFN}.w3.weight", transform="rows"),
    row(f"{FFN}.mlp.fc2_weight", f"{FFN}.w2.weight"),
    *(row(f"{FFN}.{name}.weight", f"{FFN}.{name}.weight") for name in ("w1", "w2", "w3")),
    row(f"{FFN}.router_DE", f"{FFN}.router.weight", transform="turned"),
    row(f"{FFN}.experts.moe_w_in_eD_F", f"{FFN}.experts.w1", transform="flat_experts"),
    row(f"{FFN}.experts.moe_w_swiglu_eD_F", f"{FFN}.experts.w3", transform="flat_experts"),
    row(f"{FFN}.experts.moe_w_out_eF_D", f"{FFN}.experts.w2", transform="flat_experts"),
    *(row(f"{FFN}.experts.{name}", f"{FFN}.experts.{name}") for name in ("w1", "w2", "w3")),
    *(
        row(f"{FFN}.{theirs}.weight", f"{FFN}.shared_expert.{ours}.weight")
        for theirs, ours in (
            ("w_in_shared_FD", "w1"), ("w_swiglu_shared_FD", "w3"), ("w_swiglu_FD", "w3"), ("w_out_shared_DF", "w2"),
            *((f"shared_expert.{name}", name) for name in ("w1", "w2", "w3")),
        )
    ),
)  # fmt: skip


def read_config(config: hf.Config, warn: Warn) -> dict[str, Any]:
    """params.json, whose scaled RoPE means factor 16 and an empty ramp where it does not say else."""
    args = read_llama({"rope_scaling_factor": 16.0, "rope_high_freq_factor": 1.0, **config}, warn)
    args["rope_theta"] = config.get("rope_theta", 5e5)
    for key in ("nope_layer_interval", "attention_chunk_size", "floor_scale", "attn_scale", "ffn_exp"):
        if config.get(key) is not None:
            args[key] = config[key]
    args["attn_temperature_tuning"] = bool(config.get("attn_temperature_tuning", False))
    args["qk_norm"] = "l2" if config.get("use_qk_norm") else None
    moe = config.get("moe_args")
    if moe:
        width = int(2 * int(args.get("ffn_exp", 4.0) * args["dim"]) / 3)
        if args["ffn_dim_multiplier"] is not None:
            width = int(args["ffn_dim_multiplier"] * width)
        if moe.get("auto_scale_F", True):
            width = int(width / (moe.get("capacity_factor", 1.0) + 1))
        args["moe"] = {
            "n_experts": moe.get("num_experts", -1),
            "top_k": moe.get("top_k", 1),
            "interleave": moe.get("interleave_moe_layer_step", 1),
            "hidden": -(-width // args["multiple_of"]) * args["multiple_of"],
        }
    return args


CONTAINERS = hf.containers(OURS, "attention", "feed_forward")
FAMILIES = (Family("meta_llama4", ROWS, read_config, None, CONTAINERS, tower=VISION, format="meta"),)
