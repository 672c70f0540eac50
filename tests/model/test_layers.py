"""Norm and RoPE against their formulas, values and gradients."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from llm.args import RopeScaling
from llm.layers.norm import RMSNorm, rms_normalise
from llm.layers.rope import inverse_frequencies, rotate, rotation
from tests.model.models import llama4, tokens


@pytest.mark.parametrize("weighted", [True, False])
def test_the_norms_own_backward_is_its_derivative(weighted):
    x = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True) if weighted else None
    assert gradcheck(lambda x, w: rms_normalise(x, 1e-3, w), (x, weight))


def test_the_norm_casts_back_before_the_weight():
    norm = RMSNorm(64, 1e-5).bfloat16()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(5, 64).bfloat16()
    wide = x.float()
    expected = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).bfloat16() * norm.weight
    # one unit in the last place of bf16: the mean is summed in another order
    torch.testing.assert_close(norm(x), expected, rtol=2**-7, atol=0)


@pytest.mark.parametrize("interleaved", [True, False])
def test_the_rotations_own_backward_is_its_derivative(interleaved):
    turn = rotation(torch.tensor([[0, 3, 9]]), inverse_frequencies(8, 100.0, None)).to(torch.complex128)
    x = torch.randn(2, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: rotate(x, turn, interleaved), (x,))


@pytest.mark.parametrize("interleaved", [True, False])
def test_rope_scores_depend_on_the_distance_only(interleaved):
    frequency = inverse_frequencies(16, 10000.0, None)
    q, k = torch.randn(2, 1, 1, 1, 16)

    def score(i, j):
        return (
            rotate(q, rotation(torch.tensor([[i]]), frequency), interleaved)
            * rotate(k, rotation(torch.tensor([[j]]), frequency), interleaved)
        ).sum()

    torch.testing.assert_close(score(9, 2), score(109, 102), rtol=1e-4, atol=1e-4)  # float32 angles of about 100


def test_the_two_layouts_are_one_rotation_of_permuted_heads():
    turn = rotation(torch.arange(7)[None], inverse_frequencies(8, 100.0, None))
    x = torch.randn(2, 7, 3, 8)
    half_of_pairs = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    assert torch.equal(rotate(x, turn, True)[..., half_of_pairs], rotate(x[..., half_of_pairs], turn, False))


@pytest.mark.parametrize("high", [4.0, 1.0])
def test_llama3_scaling_keeps_fast_frequencies_and_stretches_slow_ones(high):
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=high, original_max_position=8192)
    plain, scaled = (inverse_frequencies(128, 5e5, s).double() for s in (None, scaling))
    for f, g in zip(plain.tolist(), scaled.tolist(), strict=True):
        wavelength = 2 * math.pi / f
        if wavelength < 8192 / high:
            expected = f
        elif wavelength > 8192:
            expected = f / 8
        else:
            ramp = (8192 / wavelength - 1) / (high - 1)
            expected = ((1 - ramp) / 8 + ramp) * f
        assert g == pytest.approx(expected, rel=1e-5)


def test_a_bf16_model_keeps_its_angles_in_float32():
    model = llama4(layer_pattern="attn:rope:full").bfloat16()
    ids = tokens(1, 3)
    # positions beyond 256 cannot be told apart in bf16
    near, far = (model.context(torch_input).rotation_BT1m for torch_input in (_at(ids, 1000), _at(ids, 1001)))
    assert not torch.equal(near, far) and near.dtype == torch.complex64


def _at(ids, position):
    from llm.datatypes import TransformerInput

    return TransformerInput(ids, tokens_position=position)
