"""Nemotron-H as Hugging Face writes it (NVIDIA 2025, arXiv:2504.03624): each layer is a state-space mixer, attention
without positions, or a feed-forward, by itself and behind a norm of its own.

What transformers computes is what counts here: time steps are at least `time_step_min`, and `time_step_limit` has no
say. Layers of experts are not supported, and are refused by name.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from llm.args import ModelArgs, SSMArgs
from llm.errors import UserError
from llm.foreign import hf
from llm.foreign.families.mamba import limits, mixer
from llm.foreign.family import DROP, Family, Row, Warn, row

DEFAULTS: dict[str, Any] = {
    "vocab_size": 131072, "hidden_size": 4096, "intermediate_size": 21504, "num_attention_heads": 32,
    "num_key_value_heads": 8, "max_position_embeddings": 4096, "mlp_bias": False, "mlp_hidden_act": "relu2",
    "ssm_state_size": 128, "mamba_num_heads": 128, "mamba_head_dim": 64, "mamba_hidden_act": "silu", "n_groups": 8,
    "conv_kernel": 4, "expand": 2, "time_step_min": 0.001, "time_step_limit": (0.0, float("inf")), "chunk_size": 128,
    "use_conv_bias": True, "use_bias": False, "layer_norm_epsilon": 1e-5, "initializer_range": 0.02,
}  # fmt: skip
"""What transformers takes for keys that a config leaves out."""
HEAD_DIM = 128
"""The same; of two spellings."""
LAYERS = ("linear_attention", "moe", "full_attention", "mlp")
"""The same."""
KINDS = {
    "M": "ssm+none", "mamba": "ssm+none", "linear_attention": "ssm+none",
    "*": "attn+none", "attention": "attn+none", "full_attention": "attn+none",
    "-": "none+dense", "mlp": "none+dense",
}  # fmt: skip
"""Layers as configs call them, in a string of one letter each, and in lists of two generations."""
WRITTEN = {"ssm": ("M", "linear_attention"), "attn": ("*", "full_attention"), "none": ("-", "mlp")}


def _pattern(config: hf.Config, warn: Warn) -> list[str]:
    """The layers, in our words: by the list where there is one, else by the string."""
    lists, letters = ("layers_block_type", "layer_types"), "hybrid_override_pattern"
    key = next((key for key in (*lists, letters) if config.get(key) is not None), lists[0])
    said = hf.one_of(config, lists, warn) or config.get(letters) or LAYERS
    for kind in said:
        if kind in ("E", "moe"):
            raise UserError(
                f"config.json: {key}: layers of experts ({kind}) are not supported in nemotron_h; only mixers and "
                f"dense feed-forwards are"
            )
        if kind not in KINDS:
            raise UserError(f"config.json: {key}: {kind} is not one of {', '.join(KINDS)}")
    found = [KINDS[kind] for kind in said]
    beside = config.get(letters)
    if key in lists and beside is not None and [KINDS.get(kind) for kind in beside] != found:
        warn(f"config.json: {key} and {letters} contradict each other; the first is used")
    if config.get("num_hidden_layers") not in (None, len(found)):
        count = config["num_hidden_layers"]
        warn(f"config.json: num_hidden_layers={count} and the {len(found)} layers of {key} contradict; these are used")
    return found


def read_config(config: hf.Config, warn: Warn) -> dict[str, Any]:
    pattern, config = _pattern(config, warn), hf.with_defaults(config, DEFAULTS, warn)
    if config["mamba_hidden_act"] not in ("silu", "swish"):
        raise UserError(f"config.json: mamba_hidden_act={config['mamba_hidden_act']} is not supported; only silu is")
    if config.get("tie_word_embeddings"):
        raise UserError("config.json: tie_word_embeddings=true: nemotron_h has an output matrix of its own")
    for key, plain in (("attention_bias", False), ("sliding_window", None)):
        if config.get(key) not in (plain, None):
            warn(f"config.json: {key}={config[key]} is nothing that this family reads, in transformers either")
    least, (low, high) = float(config["time_step_min"]), limits(config)
    if high is not None or low not in (0.0, least):
        warn(
            f"config.json: time_step_limit={[low, high]} is nothing that this family reads, in transformers either; "
            f"time_step_min={least} is its least time step"
        )
    heads, width, expand = config["mamba_num_heads"], config["mamba_head_dim"], config["expand"]
    kv_heads, head_dim = config["num_key_value_heads"], hf.one_of(config, ("head_dim", "attention_head_dim"), warn)
    return {
        "dim": config["hidden_size"],
        "n_layers": len(pattern),
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_attention_heads"] if kv_heads is None else kv_heads,
        "head_dim": HEAD_DIM if head_dim is None else head_dim,
        "vocab_size": config["vocab_size"],
        "max_seq_len": config["max_position_embeddings"],
        "layer_pattern": pattern,
        "pos": "none",
        "norm_eps": config["layer_norm_epsilon"],
        "norm_fp32_weight": True,
        "ffn_hidden": config["intermediate_size"],
        "act": hf.activation(config, "mlp_hidden_act"),
        "gated": False,
        "ffn_bias": bool(config["mlp_bias"]),
        "init_std": config["initializer_range"],
        "ssm": {
            "d_state": config["ssm_state_size"],
            "d_conv": config["conv_kernel"],
            "expand": expand,
            "head_width": width,
            "heads": None if heads * width == expand * config["hidden_size"] else heads,
            "groups": config["n_groups"],
            "chunk": config["chunk_size"],
            "dt_limit": (least, None),
            "bias": bool(config["use_bias"]),
            "conv_bias": bool(config["use_conv_bias"]),
        },
    }


def write_config(args: ModelArgs) -> dict[str, Any]:
    ssm, specs = args.ssm or SSMArgs(), args.layer_specs()
    kinds = {(spec.mixer.name, spec.stride, spec.ffn) for spec in specs}
    if not kinds <= {("ssm", 1, "none"), ("attn", 1, "none"), ("none", 1, "dense")}:
        raise UserError(f"a nemotron_h config cannot say model.layer_pattern={args.layer_pattern}")
    if args.tie_embeddings:
        raise UserError("a nemotron_h config cannot say model.tie_embeddings=True")
    least, most = ssm.dt_limit
    if most is not None:
        raise UserError(f"a nemotron_h config cannot say model.ssm.dt_limit={[least, most]}, only its first number")
    written = [WRITTEN[spec.mixer.name] for spec in specs]
    return {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "vocab_size": args.vocab_size,
        "hidden_size": args.dim,
        "num_hidden_layers": args.n_layers,
        "hybrid_override_pattern": "".join(letter for letter, _ in written),
        "layers_block_type": [name for _, name in written],
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.kv_heads,
        "head_dim": args.head_width,
        "max_position_embeddings": args.max_seq_len,
        "intermediate_size": args.ffn_width(),
        "mlp_hidden_act": hf.written_activation(args),
        "mlp_bias": args.ffn_bias,
        "attention_bias": False,
        "ssm_state_size": ssm.d_state,
        "conv_kernel": ssm.d_conv,
        "expand": ssm.expand,
        "mamba_num_heads": ssm.widths(args.dim)[1],
        "mamba_head_dim": ssm.head_width,
        "mamba_hidden_act": "silu",
        "n_groups": ssm.groups,
        "chunk_size": ssm.chunk,
        "time_step_min": least,
        "time_step_limit": [least, float("inf")],
        "use_bias": ssm.bias,
        "mamba_proj_bias": ssm.bias,
        "use_conv_bias": ssm.conv_bias,
        "layer_norm_epsilon": args.norm_eps,
        "tie_word_embeddings": False,
        "initializer_range": args.init_std,
        "use_cache": True,
    }


SILENT = (
    # of layers of experts, and of those that predict further tokens, which a model that is read has not
    "moe_intermediate_size", "moe_latent_size", "moe_shared_expert_intermediate_size", "moe_shared_expert_overlap",
    "n_group", "n_routed_experts", "n_shared_experts", "norm_topk_prob", "num_experts_per_tok", "routed_scaling_factor",
    "topk_group", "mtp_layers_block_type", "mtp_hybrid_override_pattern", "num_nextn_predict_layers",
    # of initial values, of other programs, and of what transformers does not read
    "mamba_proj_bias", "mamba_ssm_cache_dtype", "rescale_prenorm_residual", "residual_in_fp32", "time_step_floor",
    "time_step_max", "time_step_rank", "use_mamba_kernels",
)  # fmt: skip
LAYER = "backbone.layers.{i}"


def _rows(stem: str) -> Iterator[Row]:
    """On disk all stands in `backbone`, in memory of transformers 5 in `model`."""
    layer = f"{stem}.layers.{{i}}"
    yield from hf.ends(f"{stem}.embeddings", f"{stem}.norm_f", "lm_head")
    yield from hf.norms(layer, attention_norm="norm")
    yield from hf.norms(layer, ffn_norm="norm")
    yield from (replace(entry, mixer="ssm") for entry in mixer(f"{layer}.mixer"))
    yield from (replace(entry, mixer="attn") for entry in hf.attention(f"{layer}.mixer"))
    for theirs, ours in (("up_proj", "w1"), ("down_proj", "w2")):
        yield row(f"{layer}.mixer.{theirs}.weight", f"layers.{{i}}.feed_forward.{ours}.weight", bias=True)


FAMILIES = (
    Family("nemotron_h", (*_rows("backbone"), *_rows("model")), read_config, write_config,
           hf.containers(LAYER, "mixer", "mixer"), drop=(*DROP, r"mtp\..*"), silent=SILENT,
           architecture="NemotronHForCausalLM"),
)  # fmt: skip
