"""Activation checkpointing changes what is held in memory, and nothing else."""

from collections import Counter

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from llm.datatypes import TransformerInput
from llm.generate import generate
from llm.recompute import recomputed
from tests.model.models import MOE, llama4, tokens

LOSSES = dict(aux_alpha=0.01, z_alpha=0.001)
KINDS = {
    "dense": {},
    "tied": dict(tie_embeddings=True),
    "moe": dict(moe=MOE | LOSSES | dict(interleave=2, top_k=2)),
    "mixtral": dict(moe=MOE | LOSSES | dict(top_k=2, apply="output", shared=False)),
}
ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"


def step(model, keep_graph=False):
    """Loss, statistics and gradients of a packed batch."""
    ids = TransformerInput(tokens(3, 32), cu_seqlens=torch.tensor([0, 5, 32, 51, 64, 96]))
    model.zero_grad()
    out = model(ids, labels=tokens(3, 32, seed=2))
    parts = [out.loss_sum] if out.expert_counts is None else [out.loss_sum, out.balance_sum, out.z_sum]
    sum(parts).backward(retain_graph=keep_graph)
    if keep_graph:
        sum(parts).backward()
    counts = [] if out.expert_counts is None else [out.expert_counts]
    return [*(part.detach() for part in parts), *counts, *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_statistics_and_gradients_keep_their_bits(kind, mode, dtype):
    model = llama4(**KINDS[kind]).to(dtype)
    expected = step(model)
    model.activation_checkpointing = mode
    for value, reference in zip(step(model), expected, strict=True):
        assert torch.equal(value, reference)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_a_graph_can_be_walked_twice(mode):
    model = llama4(**KINDS["moe"])
    expected = step(model, keep_graph=True)
    model.activation_checkpointing = mode
    for value, reference in zip(step(model, keep_graph=True), expected, strict=True):
        assert torch.equal(value, reference)


def held_bytes(model, ids) -> int:
    """What the forward leaves allocated for its backward, weights and inputs not counted."""
    model(ids, labels=ids)  # what is made once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as memory:
        out = model(ids, labels=ids)
    held = sum(event.self_cpu_memory_usage for event in memory.key_averages())
    assert out.loss_sum.requires_grad  # the graph is alive until here
    return held


def test_full_holds_a_blocks_input_and_selective_also_the_products():
    D, H, K, d, F, L, B, T, V = 64, 4, 2, 16, 176, 6, 2, 128, 97
    model = llama4(
        dim=D, n_heads=H, n_kv_heads=K, ffn_hidden=F, n_layers=L, attention_chunk_size=None, nope_layer_interval=None,
        attn_temperature_tuning=False,
    )  # fmt: skip
    ids = tokens(B, T)
    held = {}
    for mode in ("none", "selective", "full"):
        model.activation_checkpointing = mode
        held[mode] = held_bytes(model, ids)
    outside = 2 * B * T * D + V * D  # the last norm's input, and the gradients that the loss has taken already
    qkv, attended, written, gates = (H + 2 * K) * d, H * d + H, D, 2 * F
    # 5 %: angles, the norms' scales, indices
    assert held["full"] == pytest.approx(4 * (outside + L * B * T * D), rel=0.05)
    products = L * B * T * (D + qkv + attended + written + gates)
    assert held["selective"] == pytest.approx(4 * (outside + products), rel=0.05)
    # more by two normed inputs, queries and keys before and after their norm, and what the feed-forward multiplies
    assert held["none"] > 1.3 * held["selective"]


class Operations(TorchDispatchMode):
    """Counts what is really computed."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.name()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("mode", "repeated"), [("none", 0), ("selective", 0), ("full", 1)])
def test_selective_repeats_neither_attention_nor_expert_products(mode, repeated):
    model = llama4(**KINDS["moe"])
    model.activation_checkpointing = mode
    loss = model(tokens(2, 8), labels=tokens(2, 8)).loss_sum
    with Operations() as operations:
        loss.backward()
    assert operations.calls[ATTENTION] == 4 * repeated
    assert operations.calls["llm::grouped_matmul"] == 2 * 3 * repeated
    assert operations.calls[ATTENTION + "_backward"] == 4


def test_a_kept_result_that_was_changed_in_place_is_refused():
    x, weight = torch.randn(4, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)

    def block(x):
        product = torch.mm(x, weight)
        return torch.mm((product.mul_(2)).sin(), weight)

    with pytest.raises(RuntimeError, match="aten::mm was changed in place"):
        recomputed("selective", block, x).sum().backward()


def test_generation_does_not_change():
    model = llama4(**KINDS["moe"])
    expected = generate(model, [[1, 2, 3], [4]], max_new_tokens=12)
    model.activation_checkpointing = "full"
    assert generate(model, [[1, 2, 3], [4]], max_new_tokens=12) == expected
