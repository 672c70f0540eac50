"""A family of foreign checkpoints as a user adds one: other names for the same parameters, and a config of its own.

    tools/convert.py import SRC DST --extensions=docs/extend/moving_average.py,docs/extend/two_names.py

Layers of the mixer `average` are among them, so both files are given.
"""

from collections.abc import Mapping
from typing import Any

from llm.args import ModelArgs
from llm.errors import UserError
from llm.foreign.family import Family, Warn, register, row

BLOCK = "decoder.{i}"
OURS = "layers.{i}"

ROWS = (
    row("embed.weight", "tok_embeddings.weight"),
    row("final.weight", "norm.weight"),
    row("head.weight", "output.weight"),
    row(f"{BLOCK}.norm_a.weight", f"{OURS}.attention_norm.weight"),
    row(f"{BLOCK}.norm_b.weight", f"{OURS}.ffn_norm.weight"),
    *(row(f"{BLOCK}.attend.{name}.weight", f"{OURS}.attention.w{name}.weight") for name in "qkvo"),
    row(f"{BLOCK}.average.rate", f"{OURS}.attention.rate"),
    row(f"{BLOCK}.average.into.weight", f"{OURS}.attention.w_in.weight"),
    row(f"{BLOCK}.average.out.weight", f"{OURS}.attention.w_out.weight"),
    *(row(f"{BLOCK}.mlp.{name}.weight", f"{OURS}.feed_forward.{name}.weight") for name in ("w1", "w2", "w3")),
)
KEYS = {"dim": "width", "n_layers": "depth", "n_heads": "heads", "n_kv_heads": "kv_heads", "vocab_size": "vocabulary",
        "ffn_hidden": "hidden", "max_seq_len": "context", "layer_pattern": "pattern", "rope_theta": "rope"}  # fmt: skip
"""Ours -> theirs."""


def read_config(config: Mapping[str, Any], warn: Warn) -> dict[str, Any]:
    missing = [theirs for theirs in KEYS.values() if theirs not in config]
    if missing:
        raise UserError(f"config.json: {missing[0]} is missing")
    return {ours: config[theirs] for ours, theirs in KEYS.items()}


def write_config(args: ModelArgs) -> dict[str, Any]:
    values = args.model_dump(mode="json") | {"ffn_hidden": args.ffn_width(), "n_kv_heads": args.kv_heads}
    pattern = [spec.mixer.name for spec in args.layer_specs()]
    return {"model_type": "two_names"} | {theirs: values[ours] for ours, theirs in KEYS.items()} | {"pattern": pattern}


CONTAINERS = {"": "", "layers.{i}.": f"{BLOCK}.", "layers.{i}.feed_forward.": f"{BLOCK}.mlp."}
register(Family("two_names", ROWS, read_config, write_config, CONTAINERS))
