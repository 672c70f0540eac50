"""Llama 4 as Hugging Face writes it: the text model alone, or with the vision tower."""

from typing import Any

from llm.args import ModelArgs
from llm.args.layers import attention_specs
from llm.errors import UserError
from llm.foreign import hf
from llm.foreign.families import llama4_vision
from llm.foreign.family import Family, Row, Warn, row

OURS = "layers.{i}"
EXPERTS = f"{OURS}.feed_forward.experts"
VISION = (r"vision_model\..*", r"multi_modal_projector\..*")


def rows(prefix: str) -> tuple[Row, ...]:
    block = f"{prefix}model.layers.{{i}}"
    return (
        *hf.ends(f"{prefix}model.embed_tokens", f"{prefix}model.norm", f"{prefix}lm_head"),
        *hf.attention(f"{block}.self_attn"),
        *hf.feed_forward(f"{block}.feed_forward"),
        *hf.feed_forward(f"{block}.feed_forward.shared_expert", f"{OURS}.feed_forward.shared_expert"),
        row(f"{block}.feed_forward.router.weight", f"{OURS}.feed_forward.router.weight"),
        row(f"{block}.feed_forward.experts.gate_up_proj", f"{EXPERTS}.w1", f"{EXPERTS}.w3", transform="columns"),
        row(f"{block}.feed_forward.experts.down_proj", f"{EXPERTS}.w2"),
        *hf.norms(block, attention_norm="input_layernorm", ffn_norm="post_attention_layernorm"),
    )


DEFAULTS: dict[str, Any] = {
    "vocab_size": 202048, "hidden_size": 5120, "intermediate_size": 8192, "intermediate_size_mlp": 16384,
    "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
}  # fmt: skip
"""What transformers takes for keys that a config leaves out."""


def read_config(config: hf.Config, warn: Warn) -> dict[str, Any]:
    text = hf.with_defaults(config.get("text_config") or config, DEFAULTS, warn)
    n_layers = hf.required(text, "num_hidden_layers")
    hf.silu_experts(text)
    args = hf.common_args(text, warn, theta=5e5, by_layer=True) | {
        "ffn_hidden": hf.required(text, "intermediate_size_mlp"),
        "rope_interleaved": True,
        "qk_norm": "l2" if text.get("use_qk_norm", True) else None,
        "qkv_bias": text.get("attention_bias", False),
        "o_bias": text.get("attention_bias", False),
        "attn_temperature_tuning": bool(text.get("attn_temperature_tuning", True)),  # older files have the number 4
        "floor_scale": int(text.get("floor_scale", 8192)),
        "attn_scale": text.get("attn_scale", 0.1),
        "moe": _experts(text, n_layers, warn),
        **_layers(text, n_layers, warn),
    }
    scaling = args.get("rope_scaling") or {}
    if (scaling.get("factor"), scaling.get("high_freq_factor")) == (8, 4):
        warn(
            "config.json: rope_scaling has factor 8 and high_freq_factor 4, as the first Scout files did by mistake; "
            "Scout was trained with 16 and 1. The file is followed: correct it there if it is Scout"
        )
    return args


def _experts(text: hf.Config, n_layers: int, warn: Warn) -> dict[str, Any]:
    step = text.get("interleave_moe_layer_step", 1)
    layers = text.get("moe_layers")
    found = {
        "n_experts": text.get("num_local_experts", 16),
        "top_k": text.get("num_experts_per_tok", 1),
        "hidden": hf.required(text, "intermediate_size"),
        "interleave": step,
    }
    if layers is not None and list(layers) != list(range(step - 1, n_layers, step)):
        if "interleave_moe_layer_step" in text:
            warn("config.json: moe_layers and interleave_moe_layer_step contradict each other; the list is used")
        found |= {"interleave": 1, "dense_layers": [i for i in range(n_layers) if i not in set(layers)]}
    return found


def _layers(text: hf.Config, n_layers: int, warn: Warn) -> dict[str, Any]:
    """Layers without RoPE, and those that see their chunk only. In `no_rope_layers` 1 means that a layer has RoPE."""
    interval = text.get("no_rope_layer_interval", 4)
    by_interval = [not interval or (i + 1) % interval != 0 for i in range(n_layers)]
    rope = [bool(flag) for flag in (text.get("no_rope_layers") or by_interval)[:n_layers]]
    if len(rope) < n_layers:
        raise UserError(f"config.json: no_rope_layers has {len(rope)} entries for {n_layers} layers")
    if rope != by_interval and "no_rope_layer_interval" in text:
        warn("config.json: no_rope_layers and no_rope_layer_interval contradict each other; the list is used")
    size = text.get("attention_chunk_size", 8192)
    stated = hf.layer_kinds(text, "chunked_attention", "full_attention")
    chunked = [size is not None and chunk for chunk in (rope if stated is None else stated)]
    found: dict[str, Any] = {"attention_chunk_size": size if any(chunked) else None}
    if chunked == rope or not any(chunked):  # as our rule has it
        if rope == by_interval:
            return found | {"nope_layer_interval": interval or None}
        if all(rope):
            return found
    masks = ["chunk" if chunk else "full" for chunk in chunked]
    flags = ["rope" if turned else "nope" for turned in rope]
    return found | {"layer_pattern": [f"attn:{mask}:{flag}" for mask, flag in zip(masks, flags, strict=True)]}


def write_config(args: ModelArgs) -> dict[str, Any]:
    specs = args.layer_specs()
    written = hf.write_common(args, "Llama4ForCausalLM", "llama4_text") | {
        "attention_bias": args.qkv_bias,
        "intermediate_size_mlp": args.ffn_width(),
        "use_qk_norm": args.qk_norm == "l2",
        "no_rope_layers": [int(spec.rope) for spec in attention_specs(specs)],
        "no_rope_layer_interval": args.nope_layer_interval or 0,
        "attention_chunk_size": args.attention_chunk_size or args.max_seq_len,  # transformers must have one
        "layer_types": hf.layer_types(specs),
        "attn_temperature_tuning": args.attn_temperature_tuning,
        "floor_scale": args.floor_scale,
        "attn_scale": args.attn_scale,
        "moe_layers": [spec.index for spec in specs if spec.ffn == "moe"],
    }
    if args.nope_layer_interval is None:
        del written["no_rope_layer_interval"]
    if args.moe is not None:
        written |= {
            "intermediate_size": args.moe_width(),
            "num_local_experts": args.moe.n_experts,
            "num_experts_per_tok": args.moe.top_k,
        }
        if written["moe_layers"] == list(range(args.moe.interleave - 1, args.n_layers, args.moe.interleave)):
            written["interleave_moe_layer_step"] = args.moe.interleave
    return written


def read_multimodal(config: hf.Config, warn: Warn) -> dict[str, Any]:
    """Of a config without `vision_config`, its text model's."""
    vision = {"vision": llama4_vision.read_hf(config, warn)} if config.get("vision_config") else {}
    return read_config(config, warn) | vision


def write_multimodal(args: ModelArgs) -> dict[str, Any]:
    if args.vision is None:
        raise UserError("a llama4 config is of a model with vision; that of its text model alone is llama4_text")
    text = write_config(args)
    del text["architectures"]
    return {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "text_config": text,
        "tie_word_embeddings": args.tie_embeddings,
        **llama4_vision.write_hf(args),
    }


TABLE = rows("")
WITH_VISION = (*rows("language_model."), *llama4_vision.hf_rows())
CONTAINERS = hf.containers("model.layers.{i}", "self_attn", "feed_forward")
FAMILIES = (
    Family("llama4_text", TABLE, read_config, write_config, CONTAINERS, architecture="Llama4ForCausalLM"),
    Family(
        "llama4", WITH_VISION, read_multimodal, write_multimodal, {"": ""}, tower=VISION, needs_tower=True,
        silent=("tie_word_embeddings", "vision_feature_layer"),  # of the whole: what holds is in text_config
        architecture="Llama4ForConditionalGeneration",
    ),
)  # fmt: skip
