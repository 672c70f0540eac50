"""Muse Glimmer, text alone or with the vision tower: a window in most layers, every fourth from the end without RoPE
and with all in sight; a gate on the attention's output, norms without weights of token vectors, queries and keys.
"""

from typing import Any

from llm.args import ModelArgs
from llm.args.layers import attention_specs
from llm.errors import UserError
from llm.foreign import hf
from llm.foreign.families import muse_vision
from llm.foreign.family import Family, Row, Warn, row

DEFAULTS: dict[str, Any] = {
    "vocab_size": 202048, "hidden_size": 6656, "intermediate_size": 19968, "num_hidden_layers": 52,
    "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128, "hidden_activation": "silu",
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "sliding_window": 2048, "final_logit_softcapping": 20.0,
    "qk_scale_factor": 3.87, "output_multiplier": 0.19611613513818404, "post_norm_eps": 1e-8,
}  # fmt: skip
"""What transformers takes for keys that a config leaves out."""
VISION = (r"model\.(vision_tower|vision_adapter|vision_projection)\..*",)
NOPE_INTERVAL = 4
"""Layers without RoPE, counted from the last, where a config does not list them."""


def rows(prefix: str) -> tuple[Row, ...]:
    block = f"{prefix}.layers.{{i}}"
    return (
        *hf.ends(f"{prefix}.embed_tokens", f"{prefix}.norm", "lm_head"),
        *hf.attention(f"{block}.self_attn"),
        row(f"{block}.self_attn.gate_proj.weight", "layers.{i}.attention.wg.weight"),
        *hf.feed_forward(f"{block}.mlp"),
        *hf.norms(
            block,
            attention_norm="input_layernorm",
            attention_post_norm="post_attention_layernorm",
            ffn_norm="pre_feedforward_layernorm",
            ffn_post_norm="post_feedforward_layernorm",
        ),
    )


def read_config(config: hf.Config, warn: Warn) -> dict[str, Any]:
    text = hf.with_defaults(config.get("text_config") or config, DEFAULTS, warn)
    text["tie_word_embeddings"] = config.get("tie_word_embeddings", False)  # of the class that has a head
    text["hidden_act"] = text["hidden_activation"]
    biased = bool(text.get("attention_bias"))
    args = hf.common_args(text, warn, by_layer=True)
    width = args["head_dim"] or args["dim"] // args["n_heads"]
    return args | {
        "qkv_bias": biased,
        "o_bias": biased,
        "norm_offset": True,
        "final_norm_plain": True,
        "norm_place": "sandwich",
        "post_norm_eps": text["post_norm_eps"],
        "qk_norm": "plain",
        "score_scale": text["qk_scale_factor"] * width**-0.5,
        "attn_gate": True,
        "embed_norm": True,
        "logit_scale": text["output_multiplier"],
        "logit_softcap": text["final_logit_softcapping"],
        **_layers(text, args["rope_theta"]),
    }


def _layers(text: hf.Config, theta: float) -> dict[str, Any]:
    """Which layers have a window, and which RoPE. UserError where a layer has a base of its own."""
    n_layers = text["num_hidden_layers"]
    every_fourth = [(n_layers - 1 - i) % NOPE_INTERVAL == 0 for i in range(n_layers)]
    stated = hf.layer_kinds(text, "sliding_attention", "full_attention")
    windowed = [not last for last in every_fourth] if stated is None else stated
    thetas = text.get("layer_rope_theta")
    thetas = [0 if last else theta for last in every_fourth] if thetas is None else thetas
    if len(thetas) != n_layers:
        raise UserError(f"config.json: layer_rope_theta has {len(thetas)} entries for {n_layers} layers")
    for i, own in enumerate(thetas):
        if own not in (0, theta):
            raise UserError(
                f"config.json: layer_rope_theta: layer {i} has {own}; only 0 (none) and rope_theta, {theta}, are read"
            )
    window = text["sliding_window"]
    if window is None and any(windowed):
        raise UserError("config.json: sliding_window is missing, and layer_types has sliding_attention")
    items = [
        f"attn:{'window' if near else 'full'}:{'rope' if own else 'nope'}"
        for near, own in zip(windowed, thetas, strict=True)
    ]
    period = next(n for n in range(1, n_layers + 1) if all(item == items[i % n] for i, item in enumerate(items)))
    return {"layer_pattern": items[:period], "sliding_window": window if any(windowed) else None}


def write_config(args: ModelArgs) -> dict[str, Any]:
    specs = args.layer_specs()
    written = hf.write_common(args, "MuseGlimmerTextModel", "muse_glimmer_text")
    scale = args.head_width**-0.5 if args.score_scale is None else args.score_scale
    return written | {
        "attention_bias": args.qkv_bias,
        "hidden_activation": written.pop("hidden_act"),
        "sliding_window": args.sliding_window,
        "layer_types": hf.layer_types(specs),
        "layer_rope_theta": [args.rope_theta if spec.rope else 0 for spec in attention_specs(specs)],
        "final_logit_softcapping": args.logit_softcap,
        "qk_scale_factor": float(f"{scale * args.head_width**0.5:.12g}"),  # without the rounding of the two roots
        "output_multiplier": 1.0 if args.logit_scale is None else args.logit_scale,
        "post_norm_eps": args.norm_eps if args.post_norm_eps is None else args.post_norm_eps,
    }


def read_multimodal(config: hf.Config, warn: Warn) -> dict[str, Any]:
    """Of a config without `vision_config`, its text model's."""
    vision = {"vision": muse_vision.read(config, warn)} if config.get("vision_config") else {}
    return read_config(config, warn) | vision


def write_multimodal(args: ModelArgs) -> dict[str, Any]:
    if args.vision is None:
        raise UserError("a muse_glimmer config is of a model with vision; its text model's is muse_glimmer_text")
    text = write_config(args)
    del text["architectures"]
    return {
        "architectures": ["MuseGlimmerForConditionalGeneration"],
        "model_type": "muse_glimmer",
        "text_config": text,
        "tie_word_embeddings": args.tie_embeddings,
        **muse_vision.write(args),
    }


CONTAINERS = hf.containers("model.layers.{i}", "self_attn", "mlp")
INSIDE = hf.containers("model.language_model.layers.{i}", "self_attn", "mlp")
FAMILIES = (
    Family(
        "muse_glimmer_text", rows("model"), read_config, write_config, CONTAINERS, architecture="MuseGlimmerTextModel"
    ),
    Family(
        "muse_glimmer",
        (*rows("model.language_model"), *muse_vision.rows()),
        read_multimodal,
        write_multimodal,
        INSIDE,
        tower=VISION,
        needs_tower=True,
        silent=("max_position_embeddings",),  # of the tower, whose places are counted by its sides
        architecture="MuseGlimmerForConditionalGeneration",
    ),
)
