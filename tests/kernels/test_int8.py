"""Products with int8 weights are those with the weights that they stand for, and so are their gradients."""

import pytest
import torch
import torch.nn.functional as F

from llm.adapters.int8 import Rounded, fill, rounded
from llm.kernels.grouped import grouped_swiglu
from llm.kernels.int8 import Int8Weight, int8_linear

SHARE = 0.27
"""Of float32's bytes: a quarter, and a float32 scale for at least 50 values."""


def matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_every_value_is_within_half_a_step_of_its_outputs_scale() -> None:
    weight = matrix(48, 64)
    found = Int8Weight.of(weight)
    assert ((found.dequantised() - weight).abs() <= found.scale * 0.5 * (1 + 1e-6)).all()  # one more rounding
    assert found.nbytes <= SHARE * weight.nbytes
    assert torch.equal(found.values.abs().amax(1), torch.full((48,), 127, dtype=torch.int8))


def test_an_output_of_zeros_stays_zero() -> None:
    weight = matrix(3, 64)
    weight[1] = 0
    assert torch.equal(Int8Weight.of(weight).dequantised()[1], torch.zeros(64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_product_and_its_gradient_are_those_of_the_float_weight(dtype: torch.dtype) -> None:
    weight = Int8Weight.of(matrix(48, 64))
    x = matrix(5, 7, 64, seed=1).to(dtype).requires_grad_()
    grad = matrix(5, 7, 48, seed=2).to(dtype)
    out = int8_linear(x, weight)
    plain = F.linear(x, weight.dequantised(dtype))
    assert torch.equal(out, plain)
    (found,) = torch.autograd.grad(out, x, grad)
    (expected,) = torch.autograd.grad(plain, x, grad)
    torch.testing.assert_close(found, expected)  # the kernel may take the transposed weight in another order


def test_experts_compute_with_their_own_matrices() -> None:
    w1, w3 = (Int8Weight.of(matrix(3, 16, 24, seed=seed)) for seed in (1, 3))
    w2 = Int8Weight.of(matrix(3, 24, 16, seed=2))
    sizes = torch.tensor([4, 0, 5])
    x = matrix(9, 16, seed=4).requires_grad_()
    out = grouped_swiglu(x, w1, w2, w3, sizes)
    of_row = torch.repeat_interleave(torch.arange(3), sizes)
    first, second, third = (w.dequantised()[of_row] for w in (w1, w2, w3))
    up = torch.einsum("rd,rdf->rf", x, third)
    plain = torch.einsum("rf,rfd->rd", F.silu(torch.einsum("rd,rdf->rf", x, first)) * up, second)
    torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-4)  # sums in another order
    (found,) = torch.autograd.grad(out.sum(), x)
    (expected,) = torch.autograd.grad(plain.sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("shape", [(12, 16), (4, 16, 6)])
def test_the_parts_of_a_weight_that_is_cut_are_those_of_the_whole(shape: tuple[int, ...]) -> None:
    weight = matrix(*shape)

    def read(_: str, box: tuple[tuple[int, int], ...], out: torch.Tensor) -> torch.Tensor:
        return out.copy_(weight[tuple(slice(*side) for side in box)])

    every = Int8Weight.of(weight)
    for box in (((0, 4), *((0, n) for n in shape[1:])), ((2, 4), (8, 16), *((0, n) for n in shape[2:]))):
        place = tuple(slice(*side) for side in box)
        mine = Int8Weight.empty(tuple(stop - start for start, stop in box), torch.device("cpu"))
        fill(mine, read, "w", shape, box)
        assert torch.equal(mine.values, every.values[place])
        assert torch.equal(mine.dequantised(), every.dequantised()[place])
        out = torch.empty(mine.shape)
        assert torch.equal(Rounded(read, {"w": shape}).read("w", box, out), mine.dequantised())
    assert len(list(rounded(read, "w", shape, tuple((0, n) for n in shape)))) == (1 if len(shape) == 2 else shape[0])
