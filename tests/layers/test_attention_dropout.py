"""Dropout of attention weights: against plain loops, the dense mask, and itself on other cuts of the work."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llm.args import AttentionSpec, ModelArgs
from llm.args.layers import attention_specs
from llm.datatypes import TransformerInput
from llm.kernels import explicit_attention as kernel
from llm.kernels.explicit_attention import explicit_attention
from llm.kernels.keyed import LostWeights, lost, lowest, with_numbers
from llm.kernels.scores import PLAIN, Scores
from llm.layers.dropout import AttentionDropout, key_of, token_keys
from llm.layers.masks import AttentionMasks, segment_bounds
from tests.layers.oracle import dense_attention

ROWS, LENGTH, HEADS, RATE = 3, 40, 4, 0.3
SIZES = dict(dim=32, n_layers=1, n_heads=HEADS, n_kv_heads=2, vocab_size=9)
LAYERS: dict[str, dict[str, Any]] = {
    "full": {},
    "window": dict(sliding_window=7),
    "chunk": dict(attention_chunk_size=8),
    "cap, window, scale": dict(attn_softcap=1.5, sliding_window=7, score_scale=0.7),
}
PACKED = {
    "one document a row": {},
    "packed": {"cu_seqlens": torch.tensor([0, 1, 13, 29, 40, 57, 80, 120], dtype=torch.int32)},
    "left padding": {"tokens_position": (torch.arange(LENGTH) - torch.tensor([[0], [3], [39]])).clamp(min=-1)},
}
KEYS = token_keys(5, 2, torch.tensor([4, 11, 12]), ROWS * LENGTH)
SITE = key_of("weights", "layers.0")


def qkv(dtype: torch.dtype = torch.float32, rows: int = ROWS, length: int = LENGTH) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = ((rows, length, heads, 8) for heads in (HEADS, 2, 2))
    return [torch.randn(shape, generator=draw).to(dtype).requires_grad_() for shape in shapes]


def factors(bounds: np.ndarray, heads: range = range(HEADS)) -> Tensor:
    """0 or what stays is multiplied with, of each head, query and key: 1 between segments; (H, N, N)."""
    found = torch.ones(len(heads), len(KEYS), len(KEYS), dtype=torch.float64)
    for i, head in enumerate(heads):
        of_queries = with_numbers(KEYS, torch.tensor(head))
        for first, end in zip(bounds, bounds[1:], strict=False):
            gone = lost(of_queries[first:end], SITE, lowest(RATE), 0, int(end - first))
            found[i, first:end, first:end] = torch.where(gone, 0, 65536 / (65536 - lowest(RATE)))
    return found


def spec_of(layer: str) -> list[AttentionSpec]:
    return attention_specs(ModelArgs(**SIZES, **LAYERS[layer]).layer_specs())


@pytest.mark.parametrize("causal", [True, False, np.array([True, False, True])], ids=["causal", "both ways", "mixed"])
@pytest.mark.parametrize("batch", PACKED)
@pytest.mark.parametrize("layer", LAYERS)
def test_values_and_gradients_are_those_of_a_dense_mask(monkeypatch, layer: str, batch: str, causal: Any) -> None:
    monkeypatch.setattr(kernel, "LARGEST", 1)  # 16 queries at a time
    tokens = torch.zeros(ROWS, LENGTH, dtype=torch.int64)
    positions, starts = TransformerInput(tokens, **PACKED[batch]).resolve()
    (spec,), (q, k, v) = spec_of(layer), qkv()
    dropout = AttentionDropout(KEYS.view(ROWS, LENGTH), RATE)
    ours = AttentionMasks([spec], positions, starts, torch.device("cpu"), causal, dropout)(0, spec, q, k, v)
    bounds = segment_bounds(positions, starts, spec.span if spec.mask == "chunk" else None)
    dense = dense_attention(q, k, v, positions, starts, spec, causal, factors(bounds))
    oracle, upstream = dense.transpose(0, 1).view_as(q).float(), torch.randn_like(ours)
    # float32 sums of at most 40 terms of size 1
    torch.testing.assert_close(ours, oracle, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(*(torch.autograd.grad(out, (q, k, v), upstream) for out in (ours, oracle)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=2e-5)


def test_a_plain_loop_gives_the_same() -> None:
    (q, k, v), keys, word = qkv(torch.float64, 1, 6), KEYS[:6], (1 << 64) - 1
    golden = 0x9E3779B97F4A7C15

    def mixed(z: int) -> int:
        z &= word
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & word
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & word
        return z ^ (z >> 31)

    def stays(query: int, head: int, key: int) -> bool:
        of_head = mixed(int(keys[query]) + (head + 1) * golden)
        bits = mixed(mixed(of_head ^ (SITE & word)) + key // 4 * golden) >> 16 * (key % 4) & 0xFFFF
        return (bits ^ 0x8000) >= lowest(RATE)

    expected = torch.zeros(1, 6, HEADS, 8, dtype=torch.float64)
    for head in range(HEADS):
        for t in range(6):
            made = [math.exp((q[0, t, head] @ k[0, s, head // 2]).item() / 8**0.5) for s in range(t + 1)]
            for s in range(t + 1):
                if stays(t, head, s):
                    expected[0, t, head] += made[s] / sum(made) / (1 - lowest(RATE) / 65536) * v[0, s, head // 2]
    gone = LostWeights(keys[None], SITE, lowest(RATE), 0)
    torch.testing.assert_close(explicit_attention(q, k, v, PLAIN, None, gone), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scores", [PLAIN, Scores(0.5, 1.5, 3), Scores(causal=False)])
def test_gradients_are_those_of_finite_differences(scores: Scores) -> None:
    gone = LostWeights(KEYS[:14].view(2, 7), SITE, lowest(RATE), 0)
    given = qkv(torch.float64, 2, 7)
    assert torch.autograd.gradcheck(lambda q, k, v: explicit_attention(q, k, v, scores, None, gone), given)


def test_ranks_that_have_some_of_the_heads_drop_what_one_that_has_all_does() -> None:
    q, k, v = qkv()
    whole, second = (LostWeights(KEYS.view(ROWS, LENGTH), SITE, lowest(RATE), first) for first in (0, 2))
    both = explicit_attention(q, k, v, PLAIN, None, whole)
    part = explicit_attention(q[:, :, 2:], k[:, :, 1:], v[:, :, 1:], PLAIN, None, second)
    torch.testing.assert_close(part, both[:, :, 2:], rtol=1e-5, atol=1e-6)  # products of other sizes


def test_heads_layers_and_keys_are_dropped_apart_at_the_rate() -> None:
    keys, n = token_keys(0, 1, torch.arange(8), 8 * 64).view(8, 64), 8 * 64 * 64
    dropout, all_of_it = AttentionDropout(keys, 0.1), slice(0, 64)
    masks = torch.cat([dropout.of_layer(i).where(HEADS, all_of_it, all_of_it).transpose(0, 1) for i in (0, 1)])
    flat = masks.double().flatten(1)
    share = 6554 / 65536  # what a rate of 0.1 is in 16 bits
    assert (flat.mean(1) - share).abs().max() < 4 * (share * (1 - share) / n) ** 0.5
    assert (torch.corrcoef(flat) - torch.eye(len(flat))).abs().max() < 4 * n**-0.5
    neighbours = torch.corrcoef(torch.stack([masks[..., :-1].flatten(), masks[..., 1:].flatten()]).double())[0, 1]
    assert abs(float(neighbours)) < 4 * masks[..., 1:].numel() ** -0.5


def test_in_bf16_weights_and_their_products_are_float32() -> None:
    q, k, v = qkv(torch.bfloat16)
    gone = LostWeights(KEYS.view(ROWS, LENGTH), SITE, lowest(RATE), 0)
    wide = [x.detach().float().requires_grad_() for x in (q, k, v)]
    ours, theirs = (explicit_attention(*x, PLAIN, None, gone) for x in ((q, k, v), wide))
    assert torch.equal(ours, theirs.bfloat16())
    grads = (torch.autograd.grad(out, x, torch.ones_like(out)) for out, x in ((ours, (q, k, v)), (theirs, wide)))
    assert all(torch.equal(mine, right.bfloat16()) for mine, right in zip(*grads, strict=True))
