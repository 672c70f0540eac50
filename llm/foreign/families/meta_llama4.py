"""Llama 4 as Meta writes it: fused projections with norms hidden inside, experts as flat matrices, a vision tower."""

import math
from typing import Any

from llm.args import ModelArgs
from llm.errors import UserError
from llm.foreign import hf
from llm.foreign.families import llama4_vision
from llm.foreign.families.meta_llama import read_config as read_llama
from llm.foreign.families.meta_llama import write_config as write_llama
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
    row(f"{FFN}.norm.weight", f"{OURS}.ffn_norm.weight", ffn="moe"),
    row(f"{FFN}.mlp.layer_norm_weight", f"{OURS}.ffn_norm.weight", ffn="dense"),
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
            ("w_in_shared_FD", "w1"), ("w_swiglu_FD", "w3"), ("w_swiglu_shared_FD", "w3"), ("w_out_shared_DF", "w2"),
            *((f"shared_expert.{name}", name) for name in ("w1", "w2", "w3")),
        )
    ),
    *llama4_vision.meta_rows(),
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
        capacity = moe.get("capacity_factor", 1.0) if moe.get("auto_scale_F", True) else None
        args["moe"] = {
            "n_experts": moe.get("num_experts", -1),
            "top_k": moe.get("top_k", 1),
            "interleave": moe.get("interleave_moe_layer_step", 1),
            "hidden": _expert_width(args, args["dim"], capacity),
        }
    vision = llama4_vision.read_meta(config)
    return args if vision is None else {**args, "vision": vision}


def write_config(args: ModelArgs) -> dict[str, Any]:
    """params.json, with numbers from which its rules make the widths that the model has."""
    written = write_llama(args) | {
        "nope_layer_interval": args.nope_layer_interval,
        "attention_chunk_size": args.attention_chunk_size,
        "use_qk_norm": args.qk_norm == "l2",
        "attn_temperature_tuning": args.attn_temperature_tuning,
        "floor_scale": args.floor_scale,
        "attn_scale": args.attn_scale,
    }
    if args.moe is not None:
        written |= _widths(args, written)
        written["moe_args"] = {
            "num_experts": args.moe.n_experts,
            "top_k": args.moe.top_k,
            "interleave_moe_layer_step": args.moe.interleave,
            "auto_scale_F": True,
            "capacity_factor": 1.0,
        }
    if args.vision is not None:
        written["vision_args"] = llama4_vision.write_meta(args)
    return {key: value for key, value in written.items() if value is not None}


def _widths(args: ModelArgs, written: dict[str, Any]) -> dict[str, Any]:
    """multiple_of, ffn_dim_multiplier and ffn_exp by which the rules make the widths of experts too."""
    width = args.moe_width()
    said = {"ffn_exp": args.ffn_exp}
    if _expert_width({**written, **said}, args.dim, 1.0) == width:
        return said
    multiple = math.gcd(args.ffn_width(), width, 4096)
    plain = int(2 * (4 * args.dim) / 3)
    said = {"multiple_of": multiple, "ffn_dim_multiplier": (args.ffn_width() + 1 - multiple / 2) / plain}
    low, high = 0.0, 4.0 * (2 + 4 * width / args.ffn_width())
    for _ in range(60):  # the width grows with ffn_exp in steps of multiple_of
        middle = (low + high) / 2
        found = _expert_width({**said, "ffn_exp": middle}, args.dim, 1.0)
        if found == width:
            return {**said, "ffn_exp": middle}
        low, high = (middle, high) if found < width else (low, middle)
    raise UserError(f"a meta_llama4 config cannot say moe.hidden ({width}) beside ffn_hidden ({args.ffn_width()})")


def _expert_width(config: hf.Config, dim: int, capacity_factor: float | None) -> int:
    """The width of an expert that Meta's rule makes. capacity_factor: None where it does not scale with that."""
    width = int(2 * int(config.get("ffn_exp", 4.0) * dim) / 3)
    if config.get("ffn_dim_multiplier") is not None:
        width = int(config["ffn_dim_multiplier"] * width)
    if capacity_factor is not None:
        width = int(width / (capacity_factor + 1))
    multiple: int = config.get("multiple_of", 256)
    return -(-width // multiple) * multiple


CONTAINERS = hf.containers(OURS, "attention", "feed_forward")
FAMILIES = (
    Family(
        "meta_llama4", ROWS, read_config, write_config, CONTAINERS, tower=VISION, format="meta",
        computed=(llama4_vision.RESAMPLED,),
    ),
)  # fmt: skip
