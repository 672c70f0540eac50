"""Our model equals transformers' Llama 4 text model and Llama, given the same random weights."""

import pytest
import torch

from llm import LLM, ModelArgs
from llm.args import RopeScaling
from tests.model.models import VOCAB, tokens

transformers = pytest.importorskip("transformers")

D, HEADS, KV, WIDTH, FFN, EXPERT = 32, 4, 2, 8, 56, 40
CONFIGS = {
    "every layer moe, chunks, nope": dict(interleave=1, chunk=8, nope=4, temperature=False, top_k=1, qk_norm=True),
    "temperature": dict(interleave=1, chunk=8, nope=2, temperature=True, top_k=1, qk_norm=True),
    "interleaved, top 2": dict(interleave=2, chunk=16, nope=4, temperature=True, top_k=2, qk_norm=False),
    "no chunk boundary": dict(interleave=2, chunk=64, nope=4, temperature=False, top_k=1, qk_norm=True),
}


def reference(interleave, chunk, nope, temperature, top_k, qk_norm):
    torch.manual_seed(0)
    config = transformers.Llama4TextConfig(
        vocab_size=VOCAB, hidden_size=D, num_hidden_layers=4, num_attention_heads=HEADS, num_key_value_heads=KV,
        head_dim=WIDTH, intermediate_size=EXPERT, intermediate_size_mlp=FFN, num_local_experts=4,
        num_experts_per_tok=top_k, interleave_moe_layer_step=interleave, attention_chunk_size=chunk,
        no_rope_layer_interval=nope, no_rope_layers=[int((i + 1) % nope != 0) for i in range(4)],
        attn_temperature_tuning=temperature, floor_scale=4, attn_scale=0.3, use_qk_norm=qk_norm, rms_norm_eps=1e-5,
        initializer_range=0.1, tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )  # fmt: skip
    return transformers.Llama4ForCausalLM._from_config(config, attn_implementation="eager").eval()


def ours(foreign, interleave, chunk, nope, temperature, top_k, qk_norm):
    model = LLM(
        ModelArgs(
            dim=D, n_layers=4, n_heads=HEADS, n_kv_heads=KV, head_dim=WIDTH, vocab_size=VOCAB, ffn_hidden=FFN,
            qk_norm="l2" if qk_norm else None, nope_layer_interval=nope, attention_chunk_size=chunk,
            attn_temperature_tuning=temperature, floor_scale=4, attn_scale=0.3,
            moe={"n_experts": 4, "top_k": top_k, "hidden": EXPERT, "interleave": interleave},
        )
    )  # fmt: skip
    names = {"feed_forward.gate_proj": "feed_forward.w1", "feed_forward.up_proj": "feed_forward.w3",
             "feed_forward.down_proj": "feed_forward.w2", "shared_expert.gate_proj": "shared_expert.w1",
             "shared_expert.up_proj": "shared_expert.w3", "shared_expert.down_proj": "shared_expert.w2",
             "experts.down_proj": "experts.w2"}  # fmt: skip
    weights = {}
    for name, weight in foreign.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            stem = common_name(name).removesuffix("gate_up_proj")
            weights[stem + "w1"], weights[stem + "w3"] = weight.chunk(2, dim=-1)
            continue
        for theirs, mine in names.items():
            name = name.replace(theirs, mine)
        weights[common_name(name)] = weight
    model.load_state_dict(weights)
    return model


def common_name(name: str) -> str:
    table = {"model.embed_tokens": "tok_embeddings", "lm_head": "output", "input_layernorm": "attention_norm",
             "post_attention_layernorm": "ffn_norm", "self_attn.": "attention.", "q_proj": "wq", "k_proj": "wk",
             "v_proj": "wv", "o_proj": "wo", "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3",
             "mlp.down_proj": "feed_forward.w2"}  # fmt: skip
    for theirs, mine in table.items():
        name = name.replace(theirs, mine)
    return name.removeprefix("model.")


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits_equal_those_of_transformers_llama4(config):
    foreign = reference(**config)
    ids = tokens(2, 37)
    with torch.no_grad():
        expected = foreign(input_ids=ids).logits
        actual = ours(foreign, **config)(ids).logits
    # both sum the same float32 terms in another order
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "llama3 scaling"])
def test_logits_equal_those_of_transformers_llama_with_half_rotation(scaled):
    rope = {"rope_type": "default", "rope_theta": 1e4}
    if scaled:
        rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 16}  # fmt: skip
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=D, num_hidden_layers=2, num_attention_heads=HEADS, num_key_value_heads=KV,
        intermediate_size=FFN, rms_norm_eps=1e-5, initializer_range=0.1, rope_parameters=rope,
        max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    foreign = transformers.LlamaForCausalLM(config).eval()
    scaling = RopeScaling(factor=8, low_freq_factor=1, high_freq_factor=4, original_max_position=16) if scaled else None
    model = LLM(
        ModelArgs(
            dim=D, n_layers=2, n_heads=HEADS, n_kv_heads=KV, vocab_size=VOCAB, ffn_hidden=FFN, rope_theta=1e4,
            rope_interleaved=False, rope_scaling=scaling,
        )
    )  # fmt: skip
    model.load_state_dict({common_name(name): weight for name, weight in foreign.state_dict().items()})
    ids = tokens(2, 40)
    with torch.no_grad():
        expected, actual = foreign(input_ids=ids).logits, model(ids).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
