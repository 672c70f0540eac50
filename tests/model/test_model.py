"""The whole model: parameters and their table, precision, and inputs that are refused."""

import re

import pytest
import torch

from llm import LLM, ModelArgs
from llm.datatypes import TransformerInput
from tests.model.models import MOE, VOCAB, llama4, tokens


def count(**args) -> int:
    return sum(p.numel() for p in LLM(ModelArgs.model_validate(args), device="meta").parameters())


def test_parameter_counts_follow_the_formula():
    D, H, K, d, F, E, G, V, L = 64, 8, 2, 16, 100, 4, 48, 97, 6
    attention = D * H * d + 2 * D * K * d + H * d * D
    base = dict(dim=D, n_heads=H, n_kv_heads=K, head_dim=d, ffn_hidden=F, vocab_size=V, n_layers=L)
    dense = L * (attention + 3 * D * F + 2 * D) + D
    assert count(**base) == dense + 2 * V * D
    assert count(**base, tie_embeddings=True) == dense + V * D
    moe = D * E + 3 * E * D * G + 3 * D * G
    mixed = dense + L // 2 * (moe - 3 * D * F)
    assert count(**base, moe=dict(n_experts=E, hidden=G, interleave=2)) == mixed + 2 * V * D
    unshared = count(**base, moe=dict(n_experts=E, hidden=G, interleave=2, shared=False))
    assert unshared == mixed + 2 * V * D - L // 2 * 3 * D * G


def test_scout_has_its_published_size():
    scout = dict(
        dim=5120, n_layers=48, n_heads=40, n_kv_heads=8, vocab_size=202048, ffn_hidden=16384, nope_layer_interval=4,
        attention_chunk_size=8192, moe=dict(n_experts=16, hidden=8192),
    )  # fmt: skip
    assert count(**scout) == 107_769_861_120


def test_names_are_canonical():
    names = {re.sub(r"layers\.\d+", "layers.i", name) for name in llama4(moe=MOE | dict(interleave=2)).state_dict()}
    ffn = {f"{prefix}w{i}{suffix}" for i in "123" for prefix, suffix in
           (("", ".weight"), ("experts.", ""), ("shared_expert.", ".weight"))}  # fmt: skip
    assert names == (
        {"tok_embeddings.weight", "norm.weight", "output.weight", "layers.i.attention_norm.weight"}
        | {f"layers.i.attention.w{x}.weight" for x in "qkvo"}
        | {"layers.i.ffn_norm.weight", "layers.i.feed_forward.router.weight"}
        | {f"layers.i.feed_forward.{name}" for name in ffn}
    )
    assert "output.weight" not in llama4(tie_embeddings=True).state_dict()


def test_a_layer_without_feed_forward_is_attention_alone():
    model = llama4(layer_pattern="attn+none")
    assert not any("ffn" in name or "feed_forward" in name for name in model.state_dict())
    assert model(tokens(1, 5)).logits.isfinite().all()


@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "moe"])
def test_a_bf16_model_stays_close_to_float32(moe):
    ids, labels = tokens(2, 24), tokens(2, 24, seed=2)
    wide = llama4(moe=moe)
    half = llama4(moe=moe).bfloat16()
    a, b = (model(ids, labels=labels).loss_sum for model in (wide, half))
    assert b.dtype == torch.float32 and half(ids).logits.dtype == torch.float32
    torch.testing.assert_close(a, b, rtol=2e-2, atol=0)  # bf16 weights and activations carry 8 bits
    b.backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.bfloat16 for p in half.parameters())


def test_hidden_states_are_those_the_logits_come_from():
    model, ids = llama4(), tokens(1, 9)
    out = model(ids, return_hidden=True)
    assert out.logits is None
    assert torch.equal(model.logits(out.hidden), model(ids).logits)


def test_the_three_spellings_of_positions_agree():
    model, ids = llama4(), tokens(2, 9)
    plain = model(ids).logits
    for position in (None, 0, torch.arange(9), torch.arange(9).expand(2, 9)):
        assert torch.equal(model(TransformerInput(ids, tokens_position=position)).logits, plain)
    later = [model(TransformerInput(ids, tokens_position=p)).logits for p in (5, torch.arange(5, 14))]
    assert torch.equal(later[0], later[1]) and not torch.equal(later[0], plain)


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        (dict(tokens=torch.zeros(4, dtype=torch.int64)), "one row is tokens"),
        (dict(tokens=torch.zeros(1, 4)), "int64"),
        (dict(tokens=torch.zeros(1, 0, dtype=torch.int64)), "non-empty"),
        (dict(tokens=torch.tensor([[0, VOCAB]])), f"model.vocab_size={VOCAB}"),
        (dict(tokens_position=torch.arange(3)), "tokens_position must be"),
        (dict(tokens_position=torch.rand(4)), "tokens_position must be"),
        (dict(tokens_position=-1), "tokens_position=-1"),
        (dict(tokens_position=torch.tensor([0, 1, 1, 2])), "row 0 has 1 then 1 at token 2"),
        (dict(tokens_position=3, cu_seqlens=torch.tensor([0, 4, 8])), "give a tensor"),
        (dict(cu_seqlens=torch.tensor([0, 8])), "every row start"),
        (dict(cu_seqlens=torch.tensor([0, 4, 4, 8])), "rise strictly"),
        (dict(cu_seqlens=torch.tensor([0, 4, 7])), "from 0 to B"),
        (dict(cu_seqlens=torch.tensor([0.0, 4, 8])), "integer tensor on the CPU"),
    ],
)
def test_malformed_inputs_are_refused(inputs, reason):
    with pytest.raises(ValueError, match=reason):
        llama4()(TransformerInput(**(dict(tokens=tokens(2, 4)) | inputs)))


def test_labels_must_have_the_shape_of_the_tokens():
    with pytest.raises(ValueError, match="labels"):
        llama4()(tokens(2, 4), labels=tokens(2, 3))
