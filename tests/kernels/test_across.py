"""Attention of documents to those of another batch, against softmax over a mask that is written out."""

import numpy as np
import pytest
import torch
from torch import Tensor

from llm.kernels.across import Documents, Pairs, across_attention
from llm.kernels.keyed import LostWeights, lowest

HEADS, KV_HEADS, WIDTH = 4, 2, 8
ROWS, T, S = 2, 150, 90
PAIRS = {
    "unequal": (((3, 5), (70, 2), (1, 60)), ((140, 80),)),
    "one a row, padded": (((9, 9),), ((150, 33),)),
    "alike": (((75, 45), (75, 45)), ((75, 45), (75, 45))),
    "a row of padding": ((), ((20, 87), (130, 1))),
}
"""Of each row (tokens, source tokens) of its documents, one behind the other; what is left is padding."""


def documents(lengths: list[list[int]], width: int, first: int = 0) -> tuple[Documents, np.ndarray]:
    """first: padding before the first document of each row. The second result is the number of each token's document,
    -1 for padding."""
    number, found = 0, np.full((ROWS, width), -1)
    for row, of_row in enumerate(lengths):
        at = min(first, width - sum(of_row))
        for length in of_row:
            found[row, at : at + length] = number
            at, number = at + length, number + 1
    flat = found.reshape(-1)
    return Documents(np.flatnonzero(flat >= 0), np.bincount(flat[flat >= 0], minlength=number), flat.size), flat


def case(name: str, dtype: torch.dtype = torch.float32) -> tuple[tuple[Tensor, Tensor, Tensor], Pairs, Tensor]:
    """Queries, keys and values, the pairs, and which flat query sees which flat key."""
    queries, query_of = documents([[t for t, _ in row] for row in PAIRS[name]], T)
    keys, key_of = documents([[s for _, s in row] for row in PAIRS[name]], S, first=2)
    drawn = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(ROWS, length, heads, WIDTH, generator=drawn).to(dtype).requires_grad_()
        for length, heads in ((T, HEADS), (S, KV_HEADS), (S, KV_HEADS))
    )
    seen = torch.from_numpy((query_of[:, None] == key_of) & (query_of[:, None] >= 0))
    return (q, k, v), Pairs(queries, keys, torch.device("cpu")), seen


def written_out(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float | None, cap: float | None) -> Tensor:
    groups = HEADS // KV_HEADS
    k, v = (x.flatten(0, 1).repeat_interleave(groups, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.flatten(0, 1), k) * (WIDTH**-0.5 if scale is None else scale)
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    weights = scores.masked_fill(~seen, -1e30).softmax(-1) * seen  # padding sees nothing, and makes 0
    return torch.einsum("hqk,khd->qhd", weights, v).view_as(q)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize(("scale", "cap"), [(None, None), (0.7, None), (None, 2.0)])
def test_each_document_sees_its_own_and_padding_nothing(name: str, scale: float | None, cap: float | None) -> None:
    inputs, pairs, seen = case(name)
    found, expected = across_attention(*inputs, pairs, scale, cap), written_out(*inputs, seen, scale, cap)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    toward = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    gradients = (torch.autograd.grad(out, inputs, toward) for out in (found, expected))
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)  # sums over up to 150 queries


@pytest.mark.parametrize("name", PAIRS)
def test_half_precision_rounds_and_no_more(name: str) -> None:
    inputs, pairs, seen = case(name, torch.bfloat16)
    q, k, v = (x.float() for x in inputs)
    found = across_attention(*inputs, pairs)
    assert found.dtype == torch.bfloat16
    # weights and results of 8 bits
    torch.testing.assert_close(found.float(), written_out(q, k, v, seen, None, None), rtol=2e-2, atol=2e-2)
    found.sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in inputs)


def test_a_batch_of_padding_alone_has_gradients_of_0() -> None:
    (q, k, v), _, _ = case("unequal")
    none = Documents(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64), ROWS * T)
    found = across_attention(q, k, v, Pairs(none, none, torch.device("cpu")))
    found.sum().backward()
    assert not found.any() and all(x.grad is not None and not x.grad.any() for x in (q, k, v))


@pytest.mark.parametrize("name", PAIRS)
def test_what_is_dropped_of_the_weights_follows_query_head_and_place_in_the_source(name: str) -> None:
    """And not how documents are packed: each is attended by itself here."""
    (q, k, v), pairs, _ = case(name)
    lost = LostWeights(torch.arange(ROWS * T).view(ROWS, T) * 7919, 5, lowest(0.4), 0)
    found = across_attention(q, k, v, pairs, dropout=lost).flatten(0, 1)
    bounds, key_bounds = pairs.queries.bounds(), pairs.keys.bounds()
    for number in range(len(bounds) - 1):
        here = torch.from_numpy(pairs.queries.tokens[bounds[number] : bounds[number + 1]])
        there = torch.from_numpy(pairs.keys.tokens[key_bounds[number] : key_bounds[number + 1]])
        queries, keys = (Documents(np.arange(len(x)), np.array([len(x)]), len(x)) for x in (here, there))
        alone = Pairs(queries, keys, torch.device("cpu"))
        of_it = LostWeights(lost.keys.flatten()[here][None], lost.site, lost.count, 0)
        sides = q.flatten(0, 1)[here][None], k.flatten(0, 1)[there][None], v.flatten(0, 1)[there][None]
        torch.testing.assert_close(found[here], across_attention(*sides, alone, dropout=of_it)[0])
    assert not torch.allclose(found, across_attention(q, k, v, pairs).flatten(0, 1))


@pytest.mark.parametrize("cap", [None, 2.0])
def test_a_pairs_bits_do_not_follow_those_beside_it(cap: float | None) -> None:
    inputs, pairs, _ = case("unequal")
    (q, k, v), before = inputs, across_attention(*inputs, pairs, softcap=cap)
    last = slice(pairs.keys.tokens[-80], pairs.keys.tokens[-1] + 1)
    with torch.no_grad():
        k.flatten(0, 1)[last] += 1
    same = (across_attention(q, k, v, pairs, softcap=cap) == before).flatten(1).flatten()
    assert same.view(ROWS, -1)[0].all() and not same.view(ROWS, -1)[1].all()
