"""Attention over segments equals attention with a dense mask, on every path."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llm.args import ModelArgs
from llm.args.layers import attention_specs
from llm.datatypes import TransformerInput
from llm.kernels import attention, explicit_attention
from llm.kernels.scores import PLAIN
from llm.kernels.segments import Segments
from llm.layers.masks import AttentionMasks
from tests.layers.oracle import dense_attention

ROWS, LENGTH, SPAN = 3, 40, 8
SIZES = dict(dim=32, n_heads=4, n_kv_heads=2, vocab_size=9)
LAYERS = attention_specs(
    ModelArgs(
        n_layers=3, attention_chunk_size=SPAN, layer_pattern=["attn:full", "attn:chunk", "attn:nope"], **SIZES
    ).layer_specs()
)
OTHERS = {  # one layer each
    "window": dict(sliding_window=7),
    "window of one": dict(sliding_window=1),
    "window as long as a row": dict(sliding_window=LENGTH),
    "scale": dict(score_scale=0.5),
    "cap": dict(attn_softcap=2.0),
    "cap, window, scale": dict(attn_softcap=1.5, sliding_window=7, score_scale=0.7),
    "cap, chunk": dict(attn_softcap=1.5, attention_chunk_size=SPAN),
}
BATCHES = {
    "one document a row": {},
    "packed": {"cu_seqlens": torch.tensor([0, 1, 13, 29, 40, 57, 80, 120], dtype=torch.int32)},
    "equal documents": {"cu_seqlens": torch.arange(0, 121, 20)},
    "rows that start later": {"tokens_position": torch.arange(LENGTH) + torch.tensor([[0], [5], [1000]])},
    "left padding": {"tokens_position": (torch.arange(LENGTH) - torch.tensor([[0], [3], [39]])).clamp(min=-1)},
    "positions with gaps": {"tokens_position": torch.arange(LENGTH) * 3},
}


CAUSAL = {"causal": True, "both ways": False, "of both kinds": np.array([False, True, False])}


def qkv(dtype=torch.float32):
    torch.manual_seed(0)
    heads = (4, 2, 2)
    return [torch.randn(ROWS, LENGTH, h, 8, dtype=dtype).requires_grad_() for h in heads]


def resolved(batch):
    return TransformerInput(torch.zeros(ROWS, LENGTH, dtype=torch.int64), **BATCHES[batch]).resolve()


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("spec", LAYERS, ids=["full", "chunk", "nope"])
def test_attention_equals_the_dense_mask_in_values_and_gradients(batch, spec, causal):
    positions, starts = resolved(batch)
    q, k, v = qkv()
    ours = AttentionMasks(LAYERS, positions, starts, torch.device("cpu"), CAUSAL[causal])(0, spec, q, k, v)
    oracle = dense_attention(q, k, v, positions, starts, spec, CAUSAL[causal]).transpose(0, 1).view_as(q).float()
    upstream = torch.randn_like(ours)
    # float32 sums of at most 40 terms of size 1
    torch.testing.assert_close(ours, oracle, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(*(torch.autograd.grad(out, (q, k, v), upstream) for out in (ours, oracle)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("other", OTHERS)
def test_windows_caps_and_scales_equal_the_dense_mask(monkeypatch, batch, other, causal):
    monkeypatch.setattr(explicit_attention, "QUERIES", 16)
    (spec,) = layers = attention_specs(ModelArgs(n_layers=1, **OTHERS[other], **SIZES).layer_specs())
    positions, starts = resolved(batch)
    q, k, v = qkv()
    if spec.mask == "window" and batch == "positions with gaps":
        with pytest.raises(ValueError, match="consecutive positions inside a document; row 0 has 0 then 3 at token 1"):
            AttentionMasks(layers, positions, starts, torch.device("cpu"), CAUSAL[causal])
        return
    ours = AttentionMasks(layers, positions, starts, torch.device("cpu"), CAUSAL[causal])(0, spec, q, k, v)
    oracle = dense_attention(q, k, v, positions, starts, spec, CAUSAL[causal]).transpose(0, 1).view_as(q).float()
    upstream = torch.randn_like(ours)
    torch.testing.assert_close(ours, oracle, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(*(torch.autograd.grad(out, (q, k, v), upstream) for out in (ours, oracle)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_a_window_does_not_see_what_lies_before_it(softcap):
    args = ModelArgs(n_layers=1, sliding_window=7, attn_softcap=softcap, **SIZES)
    (spec,) = layers = attention_specs(args.layer_specs())
    positions, starts = resolved("one document a row")
    q, k, v = (x.detach() for x in qkv())
    attend = AttentionMasks(layers, positions, starts, torch.device("cpu"))
    before = attend(0, spec, q, k, v)
    k[:, :5], v[:, :5] = 9.0, 9.0
    after = attend(0, spec, q, k, v)
    assert torch.equal(before[:, 11:], after[:, 11:])  # token 11 sees 5 to 11
    assert not torch.equal(before[:, 10], after[:, 10])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("spec", LAYERS[:2], ids=["full", "chunk"])
def test_the_gpu_branch_gives_its_kernel_the_same_segments(monkeypatch, batch, spec, causal):
    def reference_kernel(q, k, v, cu_seqlens, max_length, scores):
        assert scores == PLAIN._replace(causal=causal)
        assert cu_seqlens.dtype == torch.int32 and max_length == int(cu_seqlens.diff().max())
        parts = [x.split(cu_seqlens.diff().tolist()) for x in (q, k, v)]
        outs = [
            F.scaled_dot_product_attention(*(p.transpose(0, 1) for p in part), is_causal=causal, enable_gqa=True)
            for part in zip(*parts, strict=True)
        ]
        return torch.cat([out.transpose(0, 1) for out in outs])

    monkeypatch.setattr(attention, "has_varlen_kernel", lambda q: True)
    monkeypatch.setattr(attention, "varlen_attention", reference_kernel)
    positions, starts = resolved(batch)
    q, k, v = qkv()
    ours = AttentionMasks(LAYERS, positions, starts, torch.device("cpu"), causal)(0, spec, q, k, v)
    oracle = dense_attention(q, k, v, positions, starts, spec, causal).transpose(0, 1).view_as(q).float()
    torch.testing.assert_close(ours, oracle, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_the_result_of_a_segment_does_not_depend_on_the_lengths_of_others(causal):
    q, k, v = qkv()
    cut = [
        Segments(np.array([0, *cuts, 107, 120]), torch.device("cpu")) for cuts in ([], [50], [3, 9, 20, 94])
    ]
    scores = PLAIN._replace(causal=causal)
    last = [attention.segment_attention(q, k, v, segments, scores).flatten(0, 1)[107:] for segments in cut]
    assert torch.equal(last[0], last[1]) and torch.equal(last[0], last[2])


def test_rows_beside_rows_of_the_other_kind_have_the_bits_that_they_have_among_their_own():
    positions, starts = resolved("packed")
    (q, k, v), cpu = qkv(), torch.device("cpu")
    mixed = AttentionMasks(LAYERS, positions, starts, cpu, np.array([True, False, True]))(0, LAYERS[0], q, k, v)
    for rows, causal in (([0, 2], True), ([1], False)):
        alone = AttentionMasks(LAYERS, positions, starts, cpu, causal)(0, LAYERS[0], q, k, v)
        assert torch.equal(mixed[rows], alone[rows])


@pytest.mark.parametrize("batch", ["packed", "one document a row"])
def test_tokens_that_see_both_ways_are_those_of_one_call_for_every_document(batch):
    positions, starts = resolved(batch)
    q, k, v = (x.detach() for x in qkv())
    attend = AttentionMasks(LAYERS, positions, starts, torch.device("cpu"), causal=False)
    ours = attend(0, LAYERS[0], q, k, v).flatten(0, 1)
    first, end = starts[1], starts[2]
    q, k, v = (x.flatten(0, 1)[None, first:end].transpose(1, 2) for x in (q, k, v))
    alone = F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)[0]
    torch.testing.assert_close(ours[first:end], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("mask", ["full", "chunk", "window"])
def test_tokens_around_padding_in_a_document_are_as_they_are_without_it(mask, causal):
    spans = {"full": {}, "chunk": dict(attention_chunk_size=SPAN), "window": dict(sliding_window=7)}
    (spec,) = layers = attention_specs(ModelArgs(n_layers=1, **spans[mask], **SIZES).layer_specs())
    cpu, kept = torch.device("cpu"), torch.ones(ROWS, LENGTH, dtype=torch.bool)
    kept[0, [3, 4, 17]] = kept[1, [0, 20, 39]] = kept[2, 5:8] = False  # three of each row
    starts = np.array([0, 12, 40, 80, 90])
    without = starts - np.array([int((~kept.flatten()[:start]).sum()) for start in starts])
    counted = TransformerInput(
        torch.zeros(ROWS, LENGTH - 3, dtype=torch.int64), cu_seqlens=torch.tensor([*without, ROWS * (LENGTH - 3)])
    ).resolve()
    positions = np.full((ROWS, LENGTH), -1)
    positions[kept.numpy()] = counted[0].reshape(-1)
    q, k, v = qkv()
    ours = AttentionMasks(layers, positions, starts, cpu, CAUSAL[causal])(0, spec, q, k, v)
    alone = [x[kept].unflatten(0, (ROWS, -1)) for x in (q, k, v)]
    expected = AttentionMasks(layers, *counted, cpu, CAUSAL[causal])(0, spec, *alone)
    torch.testing.assert_close(ours[kept], expected.flatten(0, 1), rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(expected.flatten(0, 1))
    pairs = (torch.autograd.grad(out, (q, k, v), upstream) for out in (ours[kept], expected.flatten(0, 1)))
    for mine, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_many_segments_need_few_calls():
    lengths = np.random.default_rng(0).integers(1, 60, 200)
    slots = Segments(np.append(0, np.cumsum(lengths)), torch.device("cpu")).slots
    assert len(slots.lengths) <= 6
    assert sum(slots.sizes) < 1.25 * lengths.sum()


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("short", [0, 64], ids=["forward in bf16", "in float32"])
@pytest.mark.parametrize("batch", ["packed", "one document a row"])
def test_half_precision_attention_is_close_to_the_oracle(monkeypatch, batch, short, causal):
    monkeypatch.setattr(attention, "SHORT", short)
    positions, starts = resolved(batch)
    q, k, v = qkv(torch.bfloat16)
    attend = AttentionMasks(LAYERS, positions, starts, torch.device("cpu"), CAUSAL[causal])
    ours = attend(0, LAYERS[0], q, k, v)
    oracle = dense_attention(q, k, v, positions, starts, LAYERS[0], CAUSAL[causal]).transpose(0, 1).view_as(q)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.double(), oracle, rtol=2**-7, atol=2**-7)  # bf16 has 8 bits
    upstream = torch.randn_like(ours)
    mine, theirs = (torch.autograd.grad(out, (q, k, v), upstream.to(out.dtype)) for out in (ours, oracle))
    for ours, oracle in zip(mine, theirs, strict=True):
        # sums of at most 40 terms of size 1 with errors of 2^-9 each, rounded to 8 bits in the end
        torch.testing.assert_close(ours, oracle, rtol=2**-6, atol=2**-5)
