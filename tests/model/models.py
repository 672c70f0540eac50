"""Small models and inputs that the tests of this folder share."""

import torch
from torch import Tensor

from llm import LLM, ModelArgs

VOCAB = 97

LLAMA4 = dict(
    dim=48, n_layers=4, n_heads=4, n_kv_heads=2, vocab_size=VOCAB, ffn_hidden=64, qk_norm="l2", init_std=0.1,
    nope_layer_interval=4, attention_chunk_size=8, attn_temperature_tuning=True, floor_scale=4, attn_scale=0.3,
)  # fmt: skip
MOE = dict(n_experts=4, hidden=40)


def llama4(seed: int = 0, **changes: object) -> LLM:
    """Llama 4 in small: three chunked RoPE layers, then a global NoPE layer; dense unless moe is given."""
    return LLM(ModelArgs.model_validate(LLAMA4 | changes), seed=seed)


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))
