"""What configs and tables of the Hugging Face families have in common: two generations of spellings of one config, and
the names of attention, feed-forward and experts that most share.

Reading takes both spellings (`rope_theta` beside `rope_scaling` of transformers 4, `rope_parameters` of 5); writing
gives both.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llm.args import LayerSpec, ModelArgs, RopeScaling
from llm.args.layers import attention_specs
from llm.errors import UserError
from llm.foreign.asked import with_values
from llm.foreign.family import Row, Warn, row

Config = Mapping[str, Any]
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size")
ACTIVATIONS: dict[str, str] = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
    "relu": "relu", "relu2": "relu2",
}  # fmt: skip
WRITTEN_ACTIVATIONS = {
    "silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "relu2": "relu2",
}  # fmt: skip


def ends(embedding: str, norm: str, head: str, norm_bias: bool = False) -> Iterator[Row]:
    """Rows of token table, last norm and output."""
    yield row(f"{embedding}.weight", "tok_embeddings.weight")
    yield row(f"{norm}.weight", "norm.weight", bias=norm_bias)
    yield row(f"{head}.weight", "output.weight")


def attention(path: str, block: str = "layers.{i}.attention") -> Iterator[Row]:
    """Rows of an attention with separate projections at `path`. block: what it is of ours."""
    for theirs, ours in (("q_proj", "wq"), ("k_proj", "wk"), ("v_proj", "wv"), ("o_proj", "wo")):
        yield row(f"{path}.{theirs}.weight", f"{block}.{ours}.weight", bias=True)
    for norm in ("q_norm", "k_norm"):
        yield row(f"{path}.{norm}.weight", f"{block}.{norm}.weight")


def feed_forward(path: str, ours: str = "layers.{i}.feed_forward") -> Iterator[Row]:
    """Rows of a gated feed-forward at `path`."""
    for theirs, mine in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
        yield row(f"{path}.{theirs}.weight", f"{ours}.{mine}.weight", bias=True)


def experts(path: str, gate: str, up: str, down: str) -> Iterator[Row]:
    """Rows of softmax-routed experts at `path`: on disk a matrix each, in memory of transformers 5 stacked."""
    ours = "layers.{i}.feed_forward"
    yield row(f"{path}.gate.weight", f"{ours}.router.weight")
    for theirs, mine in ((gate, "w1"), (up, "w3"), (down, "w2")):
        yield row(f"{path}.experts.{{e}}.{theirs}.weight", f"{ours}.experts.{mine}", transform="turned")
    for stacked in dict.fromkeys((path, "model.layers.{i}.mlp")):
        yield row(f"{stacked}.gate.weight", f"{ours}.router.weight")
        both = f"{ours}.experts.w1", f"{ours}.experts.w3"
        yield row(f"{stacked}.experts.gate_up_proj", *both, transform="turned_rows")
        yield row(f"{stacked}.experts.down_proj", f"{ours}.experts.w2", transform="turned")


def norms(path: str, **names: str) -> Iterator[Row]:
    """Rows of a block's norms: ours=theirs."""
    for ours, theirs in names.items():
        yield row(f"{path}.{theirs}.weight", f"layers.{{i}}.{ours}.weight", bias=True)


def containers(block: str, attention: str, feed_forward: str) -> dict[str, str]:
    """What stands before a module's own names, ours -> theirs."""
    return {
        "": "",
        "layers.{i}.": f"{block}.",
        "layers.{i}.attention.": f"{block}.{attention}.",
        "layers.{i}.feed_forward.": f"{block}.{feed_forward}.",
    }


def required(config: Config, key: str) -> Any:
    """A key that must be there."""
    if config.get(key) is None:
        raise UserError(f"config.json: {key} is missing")
    return config[key]


def with_defaults(config: Config, defaults: Config, warn: Warn) -> dict[str, Any]:
    """A config with the keys that it leaves out as transformers has them for its family. Sizes among them are noted: no
    known writer leaves them out."""
    for key in (key for key in SIZES if key in defaults and key not in config):
        warn(f"config.json: {key} is missing, taken as {defaults[key]}, the default of transformers")
    return with_values(config, {**defaults, **config})


def filled(config: Config, defaults: Config) -> dict[str, Any]:
    """A config with defaults in the place of what it leaves out, or says to be nothing."""
    return with_values(config, {**defaults, **{key: value for key, value in config.items() if value is not None}})


def one_of(config: Config, keys: Sequence[str], warn: Warn) -> Any:
    """The value that the first of several spellings of a key has; None without any."""
    stated = {key: config[key] for key in keys if config.get(key) is not None}
    if any(value != next(iter(stated.values())) for value in stated.values()):
        warn(f"config.json: {' and '.join(stated)} contradict each other; the first is used")
    return next(iter(stated.values()), None)


def common_args(
    config: Config,
    warn: Warn,
    *,
    theta: float = 1e4,
    eps: str = "rms_norm_eps",
    rope_names: tuple[str, str] = ("rope_theta", "partial_rotary_factor"),
    partial: float | None = None,
    by_layer: bool = False,
) -> dict[str, Any]:
    """What nearly all families say in the same words. `config` has its defaults.

    theta: base of RoPE where the config has none. rope_names: how its base and the rotated part of a head are called
    beside rope_parameters. partial: that part where the config has none, of a family that can rotate less than all;
    UserError where another is asked to. by_layer: whether the family reads layer_types.
    """
    if not by_layer and len(set(config.get("layer_types") or ())) > 1:
        warn("config.json: layer_types is nothing that this family reads, in transformers either")
    heads = required(config, "num_attention_heads")
    kv_heads = config.get("num_key_value_heads")
    rope = rope_args(config, warn, theta, rope_names, 1.0 if partial is None else partial)
    if rope["rope_pct"] != 1 and partial is None:
        raise UserError(f"config.json: partial_rotary_factor={rope['rope_pct']} is not a setting of this family")
    return {
        "dim": required(config, "hidden_size"),
        "n_layers": required(config, "num_hidden_layers"),
        "n_heads": heads,
        "n_kv_heads": heads if kv_heads is None else kv_heads,
        "head_dim": config.get("head_dim"),
        "vocab_size": required(config, "vocab_size"),
        "max_seq_len": required(config, "max_position_embeddings"),
        "ffn_hidden": required(config, "intermediate_size"),
        "norm_eps": required(config, eps),
        "act": activation(config),
        "tie_embeddings": bool(config.get("tie_word_embeddings")),
        "init_std": config.get("initializer_range") or 0.02,
        "rope_interleaved": False,
        **rope,
    }


def activation(config: Config, key: str = "hidden_act") -> str:
    """The activation that the config names."""
    name = config.get(key) or "silu"
    if name not in ACTIVATIONS:
        raise UserError(f"config.json: {key}={name} is not one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def silu_experts(config: Config) -> None:
    """UserError where the config names another activation, which would be that of its experts too."""
    if activation(config) != "silu":
        raise UserError(f"config.json: hidden_act={config['hidden_act']} of experts is not supported; only silu is")


def written_activation(args: ModelArgs) -> str:
    if args.act not in WRITTEN_ACTIVATIONS:
        raise UserError(f"a Hugging Face config cannot say model.act={args.act}")
    return WRITTEN_ACTIVATIONS[args.act]


def layer_kinds(config: Config, *known: str) -> list[bool] | None:
    """Which layers `layer_types` gives the first of the known masks; None where the config has no such list."""
    kinds, n_layers = config.get("layer_types"), required(config, "num_hidden_layers")
    if kinds is None:
        return None
    if len(kinds) != n_layers:
        raise UserError(f"config.json: layer_types has {len(kinds)} entries for {n_layers} layers")
    for kind in kinds:
        if kind not in known:
            raise UserError(f"config.json: layer_types: {kind} is not one of {', '.join(known)}")
    return [kind == known[0] for kind in kinds]


def rope_args(
    config: Config,
    warn: Warn,
    theta: float,
    names: tuple[str, str] = ("rope_theta", "partial_rotary_factor"),
    partial: float = 1.0,
) -> dict[str, Any]:
    """rope_theta, rope_pct and rope_scaling, as transformers takes them: `rope_scaling` where there is one, else
    `rope_parameters`; what the chosen one lacks comes from beside it, by `names`, else from the defaults given."""
    groups = {key: one_spelling(config.get(key)) for key in ("rope_scaling", "rope_parameters")}
    if any(isinstance(value, dict) for group in groups.values() for value in group.values()):
        raise UserError("config.json: rope_parameters differ between kinds of layers, which is not supported")
    chosen = next((key for key, group in groups.items() if group), "rope_parameters")
    params = dict(groups[chosen])
    for key, name, default in zip(("rope_theta", "partial_rotary_factor"), names, (theta, partial), strict=True):
        beside = config.get(name)
        if beside is not None and params.setdefault(key, beside) != beside:
            warn(f"config.json: {chosen}.{key}={params[key]} and {beside} contradict each other; the first is used")
        params.setdefault(key, default)
    other = groups["rope_parameters"] if chosen == "rope_scaling" else {}
    for key, value in sorted(other.items()):
        if params.get(key, "default" if key == "rope_type" else None) != value:
            said = f"{key}, {params.get(key)} and {value}"
            warn(f"config.json: rope_scaling and rope_parameters contradict each other in {said}; the first is used")
            break
    kind = params.get("rope_type", "default")
    args: dict[str, Any] = {
        "rope_theta": float(params["rope_theta"]),
        "rope_pct": float(params["partial_rotary_factor"]),
    }
    if kind != "default":
        args["rope_scaling"] = _scaling(kind, params, config, warn)
    return args


def one_spelling(params: Config | None) -> dict[str, Any]:
    """A group of RoPE's numbers, without what is null, whose kind is called rope_type and not type."""
    found = {key: value for key, value in (params or {}).items() if value is not None}
    if "type" in found:
        found.setdefault("rope_type", found.pop("type"))
    return found


def _scaling(kind: str, params: dict[str, Any], config: Config, warn: Warn) -> dict[str, Any]:
    if kind not in ("linear", "dynamic", "llama3", "yarn"):
        raise UserError(f"config.json: rope_type={kind} is not one of default, linear, dynamic, llama3, yarn")
    longest = required(config, "max_position_embeddings")
    original = params.get("original_max_position_embeddings") or longest
    factor = params.get("factor")
    if factor is None:
        if kind != "yarn":
            raise UserError(f"config.json: rope_type={kind} needs a factor")
        factor = longest / original
    found: dict[str, Any] = {"kind": kind, "factor": float(factor)}
    if kind == "dynamic":
        found["original_max_position"] = longest  # what transformers goes by
    elif kind != "linear":
        found["original_max_position"] = original
    if kind == "llama3":
        for key, default in (("low_freq_factor", 1.0), ("high_freq_factor", 4.0)):
            if key not in params:
                warn(f"config.json: rope_type=llama3 without {key}, taken as {default} (Llama 3.1)")
            found[key] = float(params.get(key, default))
    if kind == "yarn":
        found |= {"beta_fast": float(params.get("beta_fast") or 32), "beta_slow": float(params.get("beta_slow") or 1)}
        found["truncate"] = params.get("truncate", True)
        found["attention_factor"] = params.get("attention_factor")
        scale, all_dim = params.get("mscale"), params.get("mscale_all_dim")
        if found["attention_factor"] is None and scale and all_dim:
            found["attention_factor"] = _mscale(factor, scale) / _mscale(factor, all_dim)
    return found


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def pattern(windowed: Sequence[bool], window: int | None) -> dict[str, Any]:
    """Keys that give the marked layers a window."""
    if window is None or not any(windowed):
        return {}
    if all(windowed):
        return {"sliding_window": window}
    period = next(n for n in range(1, len(windowed) + 1) if all(w == windowed[i % n] for i, w in enumerate(windowed)))
    items = ["attn:window" if w else "attn:full" for w in windowed[:period]]
    return {"sliding_window": window, "layer_pattern": items}


def qwen_windows(config: Config, warn: Warn) -> dict[str, Any]:
    """Windows as Qwen 2 and 3 say them: `config` as it is in the file, but for the window."""
    n, window = config["num_hidden_layers"], config.get("sliding_window")
    stated = layer_kinds(config, "sliding_attention", "full_attention")
    if not config.get("use_sliding_window") or window is None:
        if stated is not None and any(stated):
            warn("config.json: layer_types has sliding layers, but no window is in use: all of them see all before")
        return {}
    first = config.get("max_window_layers")
    windowed = [i >= (28 if first is None else first) for i in range(n)]
    if stated is not None:
        if stated != windowed and first is not None:
            warn("config.json: layer_types and max_window_layers contradict each other; layer_types is used")
        windowed = stated
    return pattern(windowed, window)


def write_common(args: ModelArgs, architecture: str, model_type: str, *, eps: str = "rms_norm_eps") -> dict[str, Any]:
    """The keys that `common_args` reads."""
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": args.dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.kv_heads,
        "head_dim": args.head_width,
        "vocab_size": args.vocab_size,
        "max_position_embeddings": args.max_seq_len,
        "intermediate_size": args.ffn_width(),
        eps: args.norm_eps,
        "hidden_act": written_activation(args),
        "tie_word_embeddings": args.tie_embeddings,
        "initializer_range": args.init_std,
        "use_cache": True,
        **write_rope(args),
    }


def write_rope(args: ModelArgs) -> dict[str, Any]:
    """RoPE in both spellings."""
    params: dict[str, Any] = {"rope_theta": args.rope_theta, "rope_type": "default"}
    if args.rope_pct != 1:
        params["partial_rotary_factor"] = args.rope_pct
    scaling = args.rope_scaling
    if scaling is not None:
        params |= {"rope_type": scaling.kind, "factor": scaling.factor, **_written(scaling)}
    written: dict[str, Any] = {"rope_parameters": params, "rope_theta": args.rope_theta}
    if scaling is not None:
        # without rope_theta: transformers 5 takes it from beside, transformers 4 does not know it here
        written["rope_scaling"] = {key: value for key, value in params.items() if key != "rope_theta"}
    if args.rope_pct != 1:
        written["partial_rotary_factor"] = args.rope_pct
    if scaling is not None and scaling.kind == "dynamic":
        written["max_position_embeddings"] = scaling.original_max_position
    return written


def _written(scaling: RopeScaling) -> dict[str, Any]:
    original = {"original_max_position_embeddings": scaling.original_max_position}
    if scaling.kind == "llama3":
        return original | {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "yarn":
        found = {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.truncate}
        factor = {} if scaling.attention_factor is None else {"attention_factor": scaling.attention_factor}
        return original | found | factor
    return {}


def layer_types(specs: Sequence[LayerSpec]) -> list[str]:
    """What transformers calls the masks of the layers."""
    names = {"full": "full_attention", "window": "sliding_attention", "chunk": "chunked_attention"}
    return [names[spec.mask] for spec in attention_specs(specs)]


def all_windowed(args: ModelArgs) -> int | None:
    """The window of all layers, for families that know no other; None without one."""
    masks = {spec.mask for spec in attention_specs(args.layer_specs())}
    return args.sliding_window if masks == {"window"} else None
