"""Norms of queries and keys with weights: the formulas, transformers' Qwen 3 and OLMo 2, caches, recomputation."""

import pytest
import torch

from llm import LLM, ModelArgs
from llm.cache import Cache
from llm.compile import compile_blocks
from llm.datatypes import TransformerInput
from llm.layers.norm import HeadsNorm
from tests.model.models import VOCAB, llama4, tokens
from tests.model.test_llama4 import common_name

transformers = pytest.importorskip("transformers")

D, HEADS, KV, WIDTH, FFN = 32, 4, 2, 12, 56
SIZES = dict(
    vocab_size=VOCAB, hidden_size=D, num_hidden_layers=2, num_attention_heads=HEADS, num_key_value_heads=KV,
    head_dim=WIDTH, intermediate_size=FFN, initializer_range=0.1, rms_norm_eps=1e-3, max_position_embeddings=64,
    tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
)  # fmt: skip


def ours(qk_norm: str) -> LLM:
    return LLM(
        ModelArgs(
            dim=D, n_layers=2, n_heads=HEADS, n_kv_heads=KV, head_dim=WIDTH, vocab_size=VOCAB, ffn_hidden=FFN,
            rope_theta=1e4, rope_interleaved=False, norm_eps=1e-3, qk_norm=qk_norm,
        )
    )  # fmt: skip


def shaken(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The model with norms whose weights are all different."""
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.5 * torch.randn(parameter.shape, generator=draw)
    return model


def test_logits_equal_those_of_transformers_qwen3():
    torch.manual_seed(0)
    foreign = shaken(transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES)).eval())
    model = ours("head")
    model.load_state_dict({common_name(name): weight for name, weight in foreign.state_dict().items()})
    ids = tokens(2, 40)
    with torch.no_grad():
        expected, actual = foreign(input_ids=ids).logits, model(ids).logits
    # both sum the same float32 terms in another order
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_equals_that_of_transformers_olmo2(dtype):
    """The attention alone: OLMo 2 has its other norms elsewhere."""
    from transformers.models.olmo2 import modeling_olmo2

    torch.manual_seed(0)
    config = transformers.Olmo2Config(**SIZES, attn_implementation="eager")
    foreign = shaken(modeling_olmo2.Olmo2Attention(config, layer_idx=0))
    for parameter in foreign.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    model = ours("full")
    attention = model.layers[0].attention
    attention.load_state_dict({common_name(name): weight for name, weight in foreign.state_dict().items()})
    ids, x = tokens(2, 30), torch.randn(2, 30, D).to(dtype)
    angles = modeling_olmo2.Olmo2RotaryEmbedding(config)(x.float(), torch.arange(30)[None])
    mask = torch.full((30, 30), float("-inf")).triu(1)[None, None]
    context = model.context(TransformerInput(ids))
    with torch.no_grad():
        expected = foreign.to(dtype)(x, angles, mask.to(dtype))[0]
        actual = attention.to(dtype)(x, context)
    # float32: the same terms in another order; bf16 rounds to 8 bits some ten times on the way
    bound = {torch.float32: 1e-5, torch.bfloat16: 2**-5}[dtype]
    torch.testing.assert_close(actual, expected, rtol=0, atol=bound * expected.abs().max().item())


def test_the_norm_of_all_heads_casts_back_after_the_weight():
    norm = HeadsNorm(24, 1e-3).bfloat16()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(50, 3, 8).bfloat16()
    wide = x.float().flatten(-2)
    expected = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-3) * norm.weight.float()).bfloat16()
    actual = norm(x).flatten(-2)
    # the mean is summed in another order, which turns a rounding to bf16 once in some thousand
    assert (actual != expected).float().mean() < 0.01
    torch.testing.assert_close(actual, expected, rtol=2**-7, atol=0)


@pytest.mark.parametrize("kind", ["head", "full"])
def test_weights_start_at_one_on_every_layer(kind):
    model = llama4(qk_norm=kind)
    for layer in model.layers:
        q_width, k_width = {"head": (12, 12), "full": (48, 24)}[kind]
        assert torch.equal(layer.attention.q_norm.weight, torch.ones(q_width))
        assert torch.equal(layer.attention.k_norm.weight, torch.ones(k_width))


@pytest.mark.parametrize("kind", ["head", "full"])
def test_a_cache_continues_the_text(kind):
    model = shaken(llama4(qk_norm=kind)).eval()
    ids = tokens(2, 21)
    cache = Cache(model.args)
    with torch.no_grad():
        parts = [model(ids[:, a:b], cache=cache).logits for a, b in ((0, 13), (13, 14), (14, 21))]
        expected = model(ids).logits
    # float32 sums over keys in another order
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def gradients(model: LLM, recompute: str) -> list[torch.Tensor]:
    model.activation_checkpointing = recompute
    ids = tokens(2, 17)
    model.zero_grad()
    model(ids[:, :-1], labels=ids[:, 1:].contiguous()).loss_sum.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("kind", ["head", "full"])
def test_recomputation_keeps_the_gradients_bits(kind):
    model = shaken(llama4(qk_norm=kind))
    expected = gradients(model, "none")
    for mode in ("selective", "full"):
        assert all(map(torch.equal, gradients(model, mode), expected))


@pytest.mark.parametrize("kind", ["head", "full"])
def test_compiled_blocks_have_the_same_gradients(kind):
    model = shaken(llama4(qk_norm=kind))
    expected = gradients(model, "none")
    compile_blocks(model, backend="aot_eager")
    for actual, right in zip(gradients(model, "none"), expected, strict=True):
        # the composed formula rounds float32 elsewhere
        torch.testing.assert_close(actual, right, rtol=0, atol=1e-5 * right.abs().max().item())
