"""Frequencies of RoPE, and the precision of its angles."""

import math

import pytest
import torch

from llm.args import RopeScaling
from llm.datatypes import TransformerInput
from llm.layers.rope import inverse_frequencies
from tests.model.models import llama4, tokens


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
    # positions beyond 256 cannot be distinguished in bf16
    near, far = (model.context(torch_input).rotation_BT1m for torch_input in (_at(ids, 1000), _at(ids, 1001)))
    assert not torch.equal(near, far) and near.dtype == torch.complex64


def _at(ids, position):
    return TransformerInput(ids, tokens_position=position)
