"""GPT-NeoX and Pythia: layer norms, biases everywhere, partial rotary, attention and feed-forward in parallel."""

from typing import Any

from llm.args import ModelArgs
from llm.foreign import hf
from llm.foreign.family import Family, Warn, row

BLOCK = "gpt_neox.layers.{i}"
OURS = "layers.{i}"
QKV = (f"{OURS}.attention.wq.weight", f"{OURS}.attention.wk.weight", f"{OURS}.attention.wv.weight")
ROWS = (
    *hf.ends("gpt_neox.embed_in", "gpt_neox.final_layer_norm", "embed_out", norm_bias=True),
    row("lm_head.weight", "output.weight"),  # as transformers 5 calls it in memory
    row(f"{BLOCK}.attention.query_key_value.weight", *QKV, transform="heads", bias=True),
    row(f"{BLOCK}.attention.dense.weight", f"{OURS}.attention.wo.weight", bias=True),
    row(f"{BLOCK}.mlp.dense_h_to_4h.weight", f"{OURS}.feed_forward.w1.weight", bias=True),
    row(f"{BLOCK}.mlp.dense_4h_to_h.weight", f"{OURS}.feed_forward.w2.weight", bias=True),
    *hf.norms(BLOCK, attention_norm="input_layernorm", ffn_norm="post_attention_layernorm"),
)


DEFAULTS: dict[str, Any] = {
    "vocab_size": 50432, "hidden_size": 6144, "intermediate_size": 24576, "num_hidden_layers": 44,
    "num_attention_heads": 64, "max_position_embeddings": 2048, "layer_norm_eps": 1e-5, "hidden_act": "gelu",
}  # fmt: skip
"""What transformers takes for keys that a config leaves out."""


def read_config(config: hf.Config, warn: Warn) -> dict[str, Any]:
    config = hf.with_defaults(config, DEFAULTS, warn)
    names = ("rotary_emb_base", "rotary_pct")
    common = hf.common_args(config, warn, eps="layer_norm_eps", rope_names=names, partial=0.25)
    biased = config.get("attention_bias", True)
    return common | {
        "n_kv_heads": common["n_heads"],
        "head_dim": None,
        "norm": "layer",
        "gated": False,
        "ffn_bias": True,
        "qkv_bias": biased,
        "o_bias": biased,
        "parallel_residual": config.get("use_parallel_residual", True),
    }


def write_config(args: ModelArgs) -> dict[str, Any]:
    written = hf.write_common(args, "GPTNeoXForCausalLM", "gpt_neox", eps="layer_norm_eps")
    for key in ("num_key_value_heads", "head_dim"):
        del written[key]
    return written | {
        "attention_bias": args.qkv_bias,
        "use_parallel_residual": args.parallel_residual,
        "rotary_pct": args.rope_pct,
        "rotary_emb_base": args.rope_theta,
    }


CONTAINERS = hf.containers(BLOCK, "attention", "mlp")
FAMILIES = (Family("gpt_neox", ROWS, read_config, write_config, CONTAINERS, architecture="GPTNeoXForCausalLM"),)
