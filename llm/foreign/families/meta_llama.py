"""Llama 2 and 3 as Meta writes them: consolidated.NN.pth, one file a tensor-parallel rank, beside params.json. Names
are ours already.
"""

from typing import Any

from llm.args import ModelArgs
from llm.foreign import hf
from llm.foreign.family import Family, Warn, row

OURS = "layers.{i}"
MATRICES = (
    *(f"attention.{name}" for name in ("wq", "wk", "wv", "wo")),
    *(f"feed_forward.{name}" for name in ("w1", "w2", "w3")),
    "attention_norm",
    "ffn_norm",
)
ROWS = (
    *(row(f"{name}.weight", f"{name}.weight") for name in ("tok_embeddings", "norm", "output")),
    *(row(f"{OURS}.{name}.weight", f"{OURS}.{name}.weight") for name in MATRICES),
)


def read_config(config: hf.Config, warn: Warn) -> dict[str, Any]:
    """params.json. A vocabulary of -1 and tied heads are settled by the weights."""
    args = {
        "dim": hf.required(config, "dim"),
        "n_layers": hf.required(config, "n_layers"),
        "n_heads": hf.required(config, "n_heads"),
        "n_kv_heads": config.get("n_kv_heads"),
        "head_dim": config.get("head_dim"),
        "vocab_size": config.get("vocab_size", -1),
        "max_seq_len": config.get("max_seq_len", 2048),
        "multiple_of": config.get("multiple_of", 256),
        "ffn_dim_multiplier": config.get("ffn_dim_multiplier"),
        "norm_eps": config.get("norm_eps", 1e-5),
        "rope_theta": config.get("rope_theta", 1e4),
    }
    if config.get("use_scaled_rope"):
        if "rope_scaling_factor" not in config:
            warn(
                "params.json: use_scaled_rope without rope_scaling_factor, taken as 8 (Llama 3.1); Llama 3.2 of 1B and "
                "3B was trained with 32: import it with --set=rope_scaling.factor=32"
            )
        args["rope_scaling"] = {
            "kind": "llama3",
            "factor": config.get("rope_scaling_factor", 8.0),
            "low_freq_factor": 1.0,
            "high_freq_factor": config.get("rope_high_freq_factor", 4.0),
            "original_max_position": 8192,
        }
    return args


def write_config(args: ModelArgs) -> dict[str, Any]:
    written: dict[str, Any] = {
        "dim": args.dim,
        "n_layers": args.n_layers,
        "n_heads": args.n_heads,
        "n_kv_heads": args.kv_heads,
        "vocab_size": args.vocab_size,
        "multiple_of": args.multiple_of,
        "norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        **_width(args),
    }
    if args.rope_scaling is not None:
        written |= {
            "use_scaled_rope": True,
            "rope_scaling_factor": args.rope_scaling.factor,
            "rope_high_freq_factor": args.rope_scaling.high_freq_factor,
        }
    return written


def _width(args: ModelArgs) -> dict[str, Any]:
    """multiple_of and ffn_dim_multiplier by which the rule makes the width that the model has."""
    if args.ffn_hidden is None:
        return {} if args.ffn_dim_multiplier is None else {"ffn_dim_multiplier": args.ffn_dim_multiplier}
    plain = int(2 * (4 * args.dim) / 3)
    multiple = next(n for n in (4096, 2048, 1024, 512, 256, 128, 64, 32, 16, 8, 4, 2, 1) if args.ffn_hidden % n == 0)
    if -(-plain // multiple) * multiple == args.ffn_hidden:
        return {"multiple_of": multiple}
    # in the middle of what is rounded to it
    return {"multiple_of": multiple, "ffn_dim_multiplier": (args.ffn_hidden + 1 - multiple / 2) / plain}


CONTAINERS = hf.containers(OURS, "attention", "feed_forward")
FAMILIES = (Family("meta_llama", ROWS, read_config, write_config, CONTAINERS, format="meta"),)
