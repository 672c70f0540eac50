"""Tiny random models of every foreign family, as transformers builds them: a table of named configs."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCAB = 97
BASE = dict(
    vocab_size=VOCAB, hidden_size=48, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
    intermediate_size=80, max_position_embeddings=128, initializer_range=0.1,
)  # fmt: skip
OF_ATTENTION = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "max_position_embeddings")
"""Keys of models that have attention and a feed-forward."""
LINEAR = dict(rope_type="linear", rope_theta=1e4, factor=4.0)
DYNAMIC = dict(rope_type="dynamic", rope_theta=1e4, factor=4.0)
LLAMA3 = dict(
    rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=16,
)  # fmt: skip
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=32)
FULL, WINDOW, CHUNK = "full_attention", "sliding_attention", "chunked_attention"
QWEN_MOE = dict(head_dim=16, num_experts=8, moe_intermediate_size=24)
LLAMA4 = dict(
    head_dim=8, intermediate_size=40, intermediate_size_mlp=64, num_local_experts=4, attention_chunk_size=8,
    no_rope_layer_interval=3, floor_scale=4, attn_scale=0.3,
)  # fmt: skip

MAMBA2 = dict(num_heads=12, head_dim=8, state_size=16, n_groups=1, chunk_size=8)
BAMBA = dict(
    attn_layer_indices=[1], mamba_n_heads=12, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=16, mamba_chunk_size=8,
)  # fmt: skip
NEMOTRON_H = dict(
    hybrid_override_pattern="M*-M-", head_dim=10, mamba_num_heads=10, mamba_head_dim=8, ssm_state_size=16, n_groups=2,
    chunk_size=8,
)  # fmt: skip
FALCON_H1 = dict(
    mamba_d_ssm=96, mamba_n_heads=12, mamba_d_head=8, mamba_n_groups=2, mamba_d_state=16, mamba_chunk_size=8,
    embedding_multiplier=3.0, lm_head_multiplier=0.4, key_multiplier=0.7, attention_in_multiplier=0.8,
    attention_out_multiplier=0.6, ssm_in_multiplier=1.2, ssm_out_multiplier=0.9,
    ssm_multipliers=[0.5, 0.8, 0.7, 1.3, 0.6], mlp_multipliers=[0.7, 1.5],
)  # fmt: skip
READ_ONLY = ("falcon_h1",)
"""Families that no model of ours is written as."""

# heads are 6: 2 of keys and values are a ratio of 3, 6 of 1, and 1 is all queries on one
CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "ratio 3": {},
        "ratio 1, biases, odd width": dict(num_key_value_heads=6, attention_bias=True, mlp_bias=True, head_dim=10),
        "one kv head, tied": dict(num_key_value_heads=1, tie_word_embeddings=True, rms_norm_eps=1e-3),
        "linear": dict(rope_parameters=LINEAR),
        "dynamic": dict(max_position_embeddings=16, rope_parameters=DYNAMIC),
        "llama3": dict(rope_parameters=LLAMA3),
        "yarn": dict(rope_parameters=YARN, head_dim=20),
        "yarn, sharp": dict(rope_parameters=YARN | dict(attention_factor=1.3, beta_fast=8.0, beta_slow=2.0)),
        "yarn, mscale": dict(rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=0.5, truncate=False), head_dim=20),
        "gelu": dict(hidden_act="gelu", rope_parameters=dict(rope_type="default", rope_theta=5e5)),
    },
    "mistral": {
        "window": dict(sliding_window=7),
        "no window, odd width": dict(sliding_window=None, head_dim=14),
        "window of 1, one kv head": dict(sliding_window=1, num_key_value_heads=1),
        "ratio 1, tied, yarn": dict(
            sliding_window=5, num_key_value_heads=6, tie_word_embeddings=True, rope_parameters=YARN
        ),
    },
    "mixtral": {
        "top 2": dict(num_local_experts=4),
        "top 1, window, one kv head": dict(
            num_local_experts=4, num_experts_per_tok=1, sliding_window=5, num_key_value_heads=1
        ),
        "all experts, ratio 1, tied": dict(
            num_local_experts=3, num_experts_per_tok=3, num_key_value_heads=6, tie_word_embeddings=True
        ),
        "odd width, linear": dict(num_local_experts=5, head_dim=10, rope_parameters=LINEAR),
    },
    "qwen2": {
        "ratio 3": {},
        "late windows, ratio 1": dict(
            use_sliding_window=True, sliding_window=6, max_window_layers=1, num_key_value_heads=6
        ),
        "windows by list, one kv head": dict(
            use_sliding_window=True, sliding_window=6, layer_types=[WINDOW, FULL, WINDOW], num_key_value_heads=1
        ),
        "tied, yarn, window off": dict(tie_word_embeddings=True, rope_parameters=YARN, sliding_window=5),
    },
    "qwen3": {
        "odd width": dict(head_dim=10),
        "late windows, biases, ratio 1": dict(
            head_dim=16, use_sliding_window=True, sliding_window=6, max_window_layers=2, attention_bias=True,
            num_key_value_heads=6,
        ),
        "all windows, one kv head, tied": dict(
            head_dim=20, use_sliding_window=True, sliding_window=5, max_window_layers=0, num_key_value_heads=1,
            tie_word_embeddings=True,
        ),
        "yarn": dict(head_dim=16, rope_parameters=YARN),
    },
    "qwen3_moe": {
        "top 1, every layer": QWEN_MOE | dict(num_experts_per_tok=1),
        "top 2, every second layer, renormalised": QWEN_MOE | dict(
            num_experts_per_tok=2, decoder_sparse_step=2, norm_topk_prob=True, num_key_value_heads=6
        ),
        "top 3, a dense layer, window, one kv head": QWEN_MOE | dict(
            num_experts_per_tok=3, mlp_only_layers=[1], use_sliding_window=True, sliding_window=6,
            num_key_value_heads=1,
        ),
        "tied, biases, odd width": QWEN_MOE | dict(
            num_experts_per_tok=2, tie_word_embeddings=True, attention_bias=True, head_dim=10
        ),
    },
    "olmo2": {
        "ratio 3": {},
        "one kv head, biases": dict(num_key_value_heads=1, attention_bias=True),
        "ratio 1, tied, linear": dict(num_key_value_heads=6, tie_word_embeddings=True, rope_parameters=LINEAR),
        "yarn": dict(rope_parameters=YARN),
    },
    "gemma": {
        "wide heads": dict(head_dim=32),
        "one kv head, odd width": dict(head_dim=10, num_key_value_heads=1),
        "ratio 1, biases, untied": dict(
            head_dim=16, num_key_value_heads=6, attention_bias=True, tie_word_embeddings=False
        ),
    },
    "gemma2": {
        "every other layer a window": dict(head_dim=32, sliding_window=6, query_pre_attn_scalar=20),
        "tight caps, one kv head, odd width": dict(
            head_dim=10, sliding_window=5, attn_logit_softcapping=0.7, final_logit_softcapping=2.0,
            num_key_value_heads=1, query_pre_attn_scalar=16,
        ),
        "no caps, ratio 1, biases": dict(
            head_dim=16, sliding_window=7, attn_logit_softcapping=None, final_logit_softcapping=None,
            num_key_value_heads=6, attention_bias=True,
        ),
        "windows by list, untied": dict(
            head_dim=16, sliding_window=4, layer_types=[FULL, WINDOW, WINDOW], tie_word_embeddings=False
        ),
    },
    "gpt_neox": {
        "a quarter rotated": dict(num_attention_heads=3),
        "one after the other, all rotated": dict(use_parallel_residual=False, rotary_pct=1.0),
        "odd width": dict(hidden_size=45, num_attention_heads=5, rotary_pct=0.5, attention_bias=False),
        "tied, linear": dict(
            tie_word_embeddings=True, rotary_pct=0.5, rope_parameters=LINEAR, hidden_act="gelu_pytorch_tanh"
        ),
        "yarn": dict(rope_parameters=YARN | dict(partial_rotary_factor=0.5), num_attention_heads=2, hidden_act="relu"),
    },
    "llama4_text": {
        "top 1, every layer": LLAMA4,
        "top 2, every second layer, ratio 1": LLAMA4 | dict(
            num_experts_per_tok=2, interleave_moe_layer_step=2, num_key_value_heads=6, no_rope_layer_interval=2
        ),
        "moe by list, no qk norm, biases, one kv head": LLAMA4 | dict(
            moe_layers=[0], use_qk_norm=False, attention_bias=True, num_key_value_heads=1,
            attn_temperature_tuning=False,
        ),
        "rope by list, llama3, tied": LLAMA4 | dict(
            no_rope_layers=[0, 1, 1], rope_parameters=LLAMA3, tie_word_embeddings=True, num_experts_per_tok=4
        ),
        "masks by list, odd width": LLAMA4 | dict(layer_types=[FULL, CHUNK, CHUNK], head_dim=10),
    },
    "mamba2": {
        "one group": MAMBA2,
        "groups, biases, tied": MAMBA2 | dict(n_groups=3, use_bias=True, tie_word_embeddings=True, conv_kernel=3),
    },
    "bamba": {
        "one of three attends": BAMBA,
        "the first attends, all rotated": BAMBA | dict(
            attn_layer_indices=[0], rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=1.0)
        ),
        "two attend, biases, tied, ratio 1": BAMBA | dict(
            attn_layer_indices=[0, 2], attention_bias=True, mlp_bias=True, mamba_proj_bias=True,
            tie_word_embeddings=True, num_key_value_heads=6, mamba_conv_bias=False,
        ),
    },
    "nemotron_h": {
        "groups, channels apart from the width": NEMOTRON_H,
        "by list, steps of at least 0.05, biases": NEMOTRON_H | dict(
            hybrid_override_pattern=None, layers_block_type=["mlp", "linear_attention", "full_attention"],
            time_step_min=0.05, use_bias=True, mlp_bias=True, use_conv_bias=False, num_key_value_heads=6,
            mamba_num_heads=12, n_groups=1,
        ),
    },
    "falcon_h1": {
        "factors, no norm": FALCON_H1,
        "norm before the gate, tied, channels apart": FALCON_H1 | dict(
            mamba_rms_norm=True, mamba_d_ssm=64, mamba_n_heads=8, tie_word_embeddings=True,
        ),
        "norm after the gate, biases, limits, no factors": dict(
            mamba_d_ssm=None, mamba_n_heads=12, mamba_d_state=16, mamba_n_groups=1, mamba_chunk_size=8,
            mamba_rms_norm=True, mamba_norm_before_gate=False, mamba_proj_bias=True, projectors_bias=True,
            attention_bias=True, mlp_bias=True, mamba_conv_bias=False, time_step_limit=(0.02, 0.3), head_dim=10,
        ),
    },
}  # fmt: skip
TABLE = [(family, name) for family, configs in CONFIGS.items() for name in configs]


def config_of(family: str, name: str) -> Any:
    changes = copy.deepcopy(CONFIGS[family][name])  # transformers writes into what it gets
    missing = {"mamba2": OF_ATTENTION, "nemotron_h": ("num_hidden_layers",)}.get(family, ())
    base = {key: value for key, value in BASE.items() if key not in missing}
    return transformers.AutoConfig.for_model(family, **(base | changes))


def reference(family: str, name: str, seed: int = 0) -> nn.Module:
    """A model of transformers whose norms and biases are random too."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config_of(family, name), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids).logits.float()
