"""Where norms cast back."""

import torch

from llm.layers.norm import RMSNorm


def test_the_norm_casts_back_before_the_weight():
    norm = RMSNorm(64, 1e-5).bfloat16()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(5, 64).bfloat16()
    wide = x.float()
    expected = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).bfloat16() * norm.weight
    # one unit in the last place of bf16: the mean is summed in another order
    torch.testing.assert_close(norm(x), expected, rtol=2**-7, atol=0)
