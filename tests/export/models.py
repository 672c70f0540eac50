"""Small models of every kind that is exported, and what eager graphs are run by."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llm import LLM, ModelArgs
from llm.export.check import Runner
from llm.export.graphs import Graph

SIZES = {"dim": 16, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 40, "ffn_hidden": 24}
MOE = {"n_experts": 4, "top_k": 2, "hidden": 16, "interleave": 2, "dense_layers": (0,)}
DECODERS: Mapping[str, dict[str, Any]] = {
    "plain": {},
    "llama4": {
        "qk_norm": "l2", "nope_layer_interval": 3, "attention_chunk_size": 4, "attn_temperature_tuning": True,
        "floor_scale": 4, "moe": MOE,
    },
    "mixtral": {"moe": MOE | {"apply": "output", "score": "softmax", "renorm": True, "shared": False}},
    "experts": {
        "moe": MOE | {"swiglu": False, "capacity": 2, "overflow": True}, "gated": False, "ffn_bias": True,
        "act": "gelu",
    },
    "gemma2": {
        "sliding_window": 5, "layer_pattern": ["attn:window", "attn:full"], "attn_softcap": 5.0, "logit_softcap": 8.0,
        "norm_offset": True, "norm_place": "sandwich", "embed_scale": 4.1, "act": "gelu_tanh", "tie_embeddings": True,
        "rope_interleaved": False,
    },
    "qwen3": {"qk_norm": "head", "head_dim": 8, "attn_gate": True, "rope_interleaved": False},
    "olmo2": {"qk_norm": "full", "norm_place": "post", "norm_fp32_weight": True, "n_kv_heads": 4},
    "neox": {
        "parallel_residual": True, "norm": "layer", "rope_pct": 0.5, "gated": False, "ffn_bias": True,
        "moe": MOE | {"swiglu": False, "capacity": 2, "overflow": True},
    },
    "mqa": {"n_kv_heads": 1, "pos": "sinusoidal"},
    "learned": {"pos": "learned", "max_seq_len": 40},
    "yarn": {"rope_scaling": {"kind": "yarn", "factor": 4.0, "original_max_position": 16}},
    "llama3": {"rope_scaling": {"kind": "llama3", "factor": 4.0, "original_max_position": 16}},
    "values": {"input_dim": 3, "output_dim": 2, "output_mean": (1.0, 2.0), "output_std": (3.0, 0.5)},
    "linear": {"rope_scaling": {"kind": "linear", "factor": 4.0, "original_max_position": 16}},
}  # fmt: skip
ENCODERS: Mapping[str, dict[str, Any]] = {
    "bert": {
        "causal": False, "pos": "learned", "max_seq_len": 40, "norm": "layer", "norm_place": "post_add", "gated": False,
        "act": "gelu", "ffn_bias": True, "qkv_bias": True, "o_bias": True,
    },
    "modern": {"causal": False, "sliding_window": 4, "layer_pattern": ["attn:full", "attn:window"]},
}  # fmt: skip
SIDED: Mapping[str, dict[str, Any]] = {
    "transformer": {
        "encoder_layers": 2, "pos": "sinusoidal", "norm": "layer", "norm_place": "post_add", "gated": False,
        "act": "relu", "ffn_bias": True, "qkv_bias": True, "o_bias": True, "n_kv_heads": 4,
    },
    "modern": {"encoder_layers": 3, "qk_norm": "head", "moe": MOE, "tie_embeddings": True, "sliding_window": 4},
    "values": {"encoder_layers": 1, "pos": "learned", "max_seq_len": 40, "input_dim": 3, "output_dim": 2},
}  # fmt: skip
"""Encoder-decoders."""


def model_of(**keys: Any) -> LLM:
    """Initial values of a size at which attention prefers something, and biases that are not 0."""
    model, drawn = LLM(ModelArgs(**SIZES | {"init_std": 0.2} | keys)).eval(), torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in ("bias", "b1", "b2", "b3"):
            torch.nn.init.normal_(parameter, std=0.2, generator=drawn)
    return model


def eager(graph: Graph) -> Runner:
    """The graph as Python runs it, without an exporter."""

    def run(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = graph(*(given[name] for name in graph.inputs))
        return dict(zip(graph.outputs, (found,) if isinstance(found, Tensor) else found, strict=True))

    return torch.no_grad()(run)
