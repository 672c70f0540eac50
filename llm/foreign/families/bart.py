"""BART (Lewis et al. 2020, arXiv:1910.13461): an encoder-decoder with one table for both sides and for the output,
learned positions, norms after the sum, and biases everywhere.

Its tables of positions begin with two rows that are never read. A bias of the logits, `final_logits_bias`, is 0 in
what was published and cannot be learned; one that is not 0 is refused.
"""

import math
from collections.abc import Iterator
from typing import Any

from llm.args import ModelArgs
from llm.errors import UserError
from llm.foreign import hf
from llm.foreign.family import Family, Row, Warn, row


def _attention(theirs: str, ours: str) -> Iterator[Row]:
    for their, mine in (("q_proj", "wq"), ("k_proj", "wk"), ("v_proj", "wv"), ("out_proj", "wo")):
        yield row(f"{theirs}.{their}.weight", f"{ours}.{mine}.weight", bias=True)


def _side(theirs: str, ours: str, mark: str) -> Iterator[Row]:
    """Rows of the decoder or the encoder."""
    yield row(f"{theirs}.embed_positions.weight", f"{ours}pos_embeddings.weight", transform="behind_two")
    yield row(f"{theirs}.layernorm_embedding.weight", f"{ours}input_norm.weight", bias=True)
    block, mine = f"{theirs}.layers.{mark}", f"{ours}layers.{mark}"
    yield from _attention(f"{block}.self_attn", f"{mine}.attention")
    yield from _attention(f"{block}.encoder_attn", f"{mine}.cross")
    for their, name in (
        ("self_attn_layer_norm", "attention_post_norm"),
        ("encoder_attn_layer_norm", "cross_post_norm"),
        ("fc1", "feed_forward.w1"),
        ("fc2", "feed_forward.w2"),
        ("final_layer_norm", "ffn_post_norm"),
    ):
        yield row(f"{block}.{their}.weight", f"{mine}.{name}.weight", bias=True)


ROWS = (
    row("model.shared.weight", "tok_embeddings.weight"),
    row("lm_head.weight", "output.weight"),
    *(row(f"model.{side}.embed_tokens.weight", "tok_embeddings.weight", twin=True) for side in ("encoder", "decoder")),
    *_side("model.decoder", "", "{i}"),
    *_side("model.encoder", "encoder.", "{k}"),
)
DEFAULTS: dict[str, Any] = {
    "vocab_size": 50265, "max_position_embeddings": 1024, "encoder_layers": 12, "encoder_ffn_dim": 4096,
    "encoder_attention_heads": 16, "decoder_layers": 12, "decoder_ffn_dim": 4096, "decoder_attention_heads": 16,
    "activation_function": "gelu", "d_model": 1024, "init_std": 0.02, "scale_embedding": False,
    "tie_word_embeddings": True,
}  # fmt: skip
"""What transformers takes for keys that a config leaves out."""
ALIKE = (("encoder_attention_heads", "decoder_attention_heads"), ("encoder_ffn_dim", "decoder_ffn_dim"))


def read_config(config: hf.Config, warn: Warn) -> dict[str, Any]:
    config = hf.with_defaults(config, DEFAULTS, warn)
    for one, other in ALIKE:
        if config[one] != config[other]:
            raise UserError(f"config.json: {one}={config[one]} and {other}={config[other]} must be the same")
    if not config["encoder_layers"]:
        raise UserError("config.json: encoder_layers=0: a BART without an encoder is not supported")
    if not config["tie_word_embeddings"]:
        raise UserError("config.json: tie_word_embeddings=false, a table of its own for each side, is not supported")
    dim = config["d_model"]
    return {
        "dim": dim,
        "n_layers": config["decoder_layers"],
        "encoder_layers": config["encoder_layers"],
        "n_heads": config["decoder_attention_heads"],
        "vocab_size": config["vocab_size"],
        "max_seq_len": config["max_position_embeddings"],
        "ffn_hidden": config["decoder_ffn_dim"],
        "act": hf.activation(config, "activation_function"),
        "embed_scale": math.sqrt(dim) if config["scale_embedding"] else None,
        "tie_embeddings": True,
        "init_std": config["init_std"],
        **FIXED,
    }


FIXED: dict[str, Any] = {
    "pos": "learned", "input_norm": True, "norm": "layer", "norm_eps": 1e-5, "norm_place": "post_add", "gated": False,
    "ffn_bias": True, "qkv_bias": True, "o_bias": True,
}  # fmt: skip
"""What no config says, as it is so of every BART."""


def write_config(args: ModelArgs) -> dict[str, Any]:
    heads, width = args.n_heads, args.ffn_width()
    return {
        "architectures": ["BartForConditionalGeneration"],
        "model_type": "bart",
        "is_encoder_decoder": True,
        "vocab_size": args.vocab_size,
        "d_model": args.dim,
        "max_position_embeddings": args.max_seq_len,
        "encoder_layers": args.encoder_layers,
        "decoder_layers": args.n_layers,
        "num_hidden_layers": args.encoder_layers,
        "encoder_attention_heads": heads,
        "decoder_attention_heads": heads,
        "encoder_ffn_dim": width,
        "decoder_ffn_dim": width,
        "activation_function": hf.written_activation(args),
        "scale_embedding": args.embed_scale is not None,
        "tie_word_embeddings": args.tie_embeddings,
        "init_std": args.init_std,
        "dropout": args.resid_dropout,
        "attention_dropout": args.attn_dropout,
        "activation_dropout": args.ffn_dropout,
        "use_cache": True,
    }


CONTAINERS = {
    "": "",
    "layers.{i}.": "model.decoder.layers.{i}.",
    "layers.{i}.attention.": "model.decoder.layers.{i}.self_attn.",
    "layers.{i}.cross.": "model.decoder.layers.{i}.encoder_attn.",
    "encoder.layers.{k}.": "model.encoder.layers.{k}.",
    "encoder.layers.{k}.attention.": "model.encoder.layers.{k}.self_attn.",
}
FAMILIES = (
    Family(
        "bart", ROWS, read_config, write_config, CONTAINERS, zeros=("final_logits_bias",),
        architecture="BartForConditionalGeneration",
    ),
)  # fmt: skip
