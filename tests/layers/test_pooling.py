"""One vector of each document, against a plain loop."""

import numpy as np
import pytest
import torch
from torch import Tensor

from llm.datatypes import TransformerInput
from llm.layers.pooling import Pool, pooled

POOLS: tuple[Pool, ...] = ("mean", "first", "last")


def in_a_loop(hidden_BTD: Tensor, inputs: TransformerInput, pool: Pool) -> Tensor:
    """By `cu_seqlens`, document after document."""
    positions_BT, starts = inputs.resolve()
    hidden_ND, found = hidden_BTD.flatten(0, 1), []
    for first, end in zip(starts, np.append(starts, len(hidden_ND))[1:], strict=True):
        valid = hidden_ND[first:end][torch.from_numpy(positions_BT.reshape(-1)[first:end] >= 0)].float()
        whole = {"mean": valid.mean(0), "first": valid[:1].sum(0), "last": valid[-1:].sum(0)}
        found.append(whole[pool] if len(valid) else torch.zeros_like(hidden_ND[0].float()))
    return torch.stack(found)


def packed() -> TransformerInput:
    """Rows of one, three and two documents."""
    return TransformerInput(torch.zeros(3, 8, dtype=torch.int64), cu_seqlens=torch.tensor([0, 8, 9, 14, 16, 20, 24]))


def padded() -> TransformerInput:
    """Rows that are padded before, after, in between, altogether."""
    positions = [[-1, -1, 0, 1, 2], [0, 1, -1, -1, -1], [0, -1, 1, -1, 2], [-1] * 5]
    return TransformerInput(torch.zeros(4, 5, dtype=torch.int64), torch.tensor(positions))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inputs", [packed(), padded()], ids=["packed", "padded"])
@pytest.mark.parametrize("pool", POOLS)
def test_documents_are_pooled_as_in_a_plain_loop(pool: Pool, inputs: TransformerInput, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(1)
    hidden = torch.randn(*inputs.tokens.shape, 6, generator=draw).to(dtype).requires_grad_()
    found, expected = pooled(hidden, *inputs.resolve(), pool), in_a_loop(hidden, inputs, pool)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)  # float32 sums in another order
    factors = torch.randn(found.shape, generator=draw)
    gradients = [torch.autograd.grad((x * factors).sum(), hidden)[0] for x in (found, expected)]
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8  # the gradient is rounded to bfloat16
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("pool", POOLS)
def test_what_lies_at_padding_has_no_part_in_it(pool: Pool) -> None:
    inputs = padded()
    positions, _ = inputs.resolve()
    hidden = torch.randn(*inputs.tokens.shape, 6)
    expected = pooled(hidden, *inputs.resolve(), pool)
    hidden[torch.from_numpy(positions < 0)] = 1e30
    assert torch.equal(pooled(hidden, *inputs.resolve(), pool), expected)


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("pool", POOLS)
def test_what_is_not_finite_stays_in_its_document(pool: Pool, number: float) -> None:
    inputs = packed()
    hidden = torch.randn(*inputs.tokens.shape, 6)
    expected = pooled(hidden, *inputs.resolve(), pool)
    hidden[1, 1:6] = number  # the second of three documents of a row, the third of all
    hidden.requires_grad_()
    found = pooled(hidden, *inputs.resolve(), pool)
    others = [0, 1, 3, 4, 5]
    assert not found[2].isfinite().any()
    assert torch.equal(found[others], expected[others])
    (gradient,) = torch.autograd.grad(found[others].sum(), hidden)
    assert gradient.isfinite().all()
