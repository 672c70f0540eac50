"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) with Llama 3's frequency scaling.

A head of width d is read as d/2 complex numbers, each turned by position times its frequency. Two layouts exist in
released weights: interleaved, where elements (2m, 2m+1) are one number (Meta), and halves, where elements (m, m + d/2)
are (Hugging Face Llama). Feeding one layout to the other gives fluent nonsense, so the layout is an argument of the
model.

Shapes: B batch, T tokens, H heads, d head width.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llm.args import RopeScaling


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """theta^(-2m/d) for m = 0 .. d/2 - 1, float32 on the CPU, stretched if `scaling` is given."""
    frequency = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)
    if scaling is None:
        return frequency
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position * frequency / (2 * math.pi)  # whole turns within the original context
    # share of the frequency that is kept: 0 for slow ones, 1 for fast ones, a ramp between (empty when low == high)
    kept = ((turns - low) / (high - low)).clamp(0, 1) if high > low else (turns >= low).float()
    return frequency * (kept + (1 - kept) / scaling.factor)


def rotation(positions_BT: Tensor, frequency: Tensor) -> Tensor:
    """Unit complex numbers exp(i * position * frequency), complex64 (B, T, 1, d/2).

    Made on demand from positions: a table would have to guess the longest text, and a buffer would be cast to bf16 with
    the model.
    """
    angle_BT1m = positions_BT[..., None, None].float() * frequency.to(positions_BT.device)
    return torch.polar(torch.ones_like(angle_BT1m), angle_BT1m)


def rotate(x_BTHd: Tensor, rotation_BT1m: Tensor, interleaved: bool) -> Tensor:
    """Turn every pair of x by its angle, in float32; the result has x's dtype."""
    return _Rotate.apply(x_BTHd, rotation_BT1m, interleaved)


class _Rotate(torch.autograd.Function):
    """The gradient of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, turn: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(turn)
        ctx.interleaved = interleaved
        return _turn(x, turn, interleaved)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (turn,) = ctx.saved_tensors
        return _turn(grad, turn.conj().resolve_conj(), ctx.interleaved), None, None


def _turn(x: Tensor, turn: Tensor, interleaved: bool) -> Tensor:
    real_dtype = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(real_dtype)
    if torch.compiler.is_compiling():  # complex numbers are not fused with what is around them
        a, b = wide.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else wide.chunk(2, dim=-1)
        pair = a * turn.real - b * turn.imag, a * turn.imag + b * turn.real
        turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
        return turned.to(x.dtype)
    if interleaved:
        pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)).contiguous()) * turn
        return torch.view_as_real(pairs).flatten(-2).to(x.dtype)
    pairs = torch.complex(*wide.chunk(2, dim=-1)) * turn
    return torch.cat([pairs.real, pairs.imag], dim=-1).to(x.dtype)
