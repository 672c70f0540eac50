"""The kernels of mamba_ssm on a GPU: against our `ssd`, and against the recurrence token by token in float64."""

import pytest
import torch
from torch import Tensor

from llm.kernels.fused_ssd import fused_ssd
from llm.kernels.ssd import ssd
from tests.gpu.test_gpu import distance
from tests.kernels.test_ssd import token_by_token

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
pytest.importorskip("mamba_ssm", reason="needs the package mamba_ssm", exc_type=ImportError)

SAID, GRADIENT = 5e-3, 2e-2
"""Relative error in the 2-norm. TF32 rounds to 11 bits, 5e-4; a value passes two products, its gradient four, and that
of a decay is a sum of terms of both signs. (Reasoned, not measured.)"""
ROWS, HEADS, WIDTH, STATE = 2, 8, 64, 32


def inputs(length: int, groups: int) -> list[Tensor]:
    """x, dt, a, B, C and a state before the first token, float64 on the CPU."""
    generator = torch.Generator().manual_seed(length + groups)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, state = draw(ROWS, length, HEADS, WIDTH), draw(ROWS, HEADS, WIDTH, STATE)
    dt, a = 0.1 * draw(ROWS, length, HEADS).abs(), -1 - draw(HEADS).abs()
    dt[0, : length // 8] = 0  # padding
    b, c = draw(2, ROWS, length, groups, STATE)
    return [y.double().requires_grad_() for y in (x, dt, a, b, c, state)]


def documents(length: int) -> Tensor:
    """A row of several, with borders at and between those of chunks, and a row of one."""
    found = torch.zeros(ROWS, length, dtype=torch.int64)
    for first in (length // 8, length // 2, length // 2 + 1):
        found[0, first:] += 1
    return found + 3


@pytest.mark.parametrize("begun", [False, True], ids=["from nothing", "from a state"])
@pytest.mark.parametrize("packed", [False, True], ids=["a document a row", "packed"])
@pytest.mark.parametrize("groups", [1, 2, HEADS])
@pytest.mark.parametrize(("length", "chunk"), [(256, 64), (300, 64), (300, 16), (40, 64), (1024, 256)])
def test_it_says_what_the_recurrence_says_and_so_do_gradients(length, chunk, groups, packed, begun):
    exact, numbers = inputs(length, groups), documents(length) if packed else None
    rounded = [y.detach().float().cuda().requires_grad_() for y in exact]
    zero = torch.zeros_like(exact[5])
    expected = token_by_token([*exact[:5], exact[5] if begun else zero], numbers)
    there = None if numbers is None else numbers.cuda()
    weights = [torch.randn_like(y) for y in expected]
    leaves = 6 if begun else 5
    for scan in (fused_ssd, ssd):
        found = scan(*rounded[:5], there, rounded[5] if begun else None, chunk)
        assert all(distance(*pair) < SAID for pair in zip(found, expected, strict=True))
        loss = sum((y * w.float().cuda()).sum() for y, w in zip(found, weights, strict=True))
        grads = torch.autograd.grad(loss, rounded[:leaves])
        loss = sum((y * w).sum() for y, w in zip(expected, weights, strict=True))
        exact_grads = torch.autograd.grad(loss, exact[:leaves], retain_graph=True)
        for mine, theirs in zip(grads, exact_grads, strict=True):
            assert distance(mine, theirs) < GRADIENT
