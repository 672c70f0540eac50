"""Turning heads by the angles of their positions (llm/layers/rope.py has the angles).

Shapes: B batch, T tokens, H heads, d head width, m rotated pairs.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llm.kernels.dtypes import wide_dtype


class Turns(NamedTuple):
    """Complex numbers as two float tensors, for graphs of programs that know no complex ones (llm/export)."""

    real: Tensor
    imag: Tensor


def rotate(x_BTHd: Tensor, rotation_BT1m: Tensor | Turns, interleaved: bool) -> Tensor:
    """Turn every pair of x by its angle, in float32; the result has x's dtype. Elements from 2m on stay as they are.
    `Turns` have no gradient of their own."""
    if isinstance(rotation_BT1m, Turns):
        return _turn(x_BTHd, rotation_BT1m, interleaved)
    return _Rotate.apply(x_BTHd, rotation_BT1m, interleaved)


class _Rotate(torch.autograd.Function):
    """The gradient of a rotation is the rotation back; of a multiplication with c, that with the conjugate of c."""

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


def _turn(x: Tensor, turn: Tensor | Turns, interleaved: bool) -> Tensor:
    width = 2 * turn.real.shape[-1]
    if width < x.shape[-1]:
        return torch.cat([_turn(x[..., :width], turn, interleaved), x[..., width:]], dim=-1)
    wide = x.to(wide_dtype(x))
    # complex numbers are not fused with what is around them by the compiler
    if isinstance(turn, Turns) or torch.compiler.is_compiling():
        a, b = wide.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else wide.chunk(2, dim=-1)
        pair = a * turn.real - b * turn.imag, a * turn.imag + b * turn.real
        turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
        return turned.to(x.dtype)
    if interleaved:
        pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)).contiguous()) * turn
        return torch.view_as_real(pairs).flatten(-2).to(x.dtype)
    pairs = torch.complex(*wide.chunk(2, dim=-1)) * turn
    return torch.cat([pairs.real, pairs.imag], dim=-1).to(x.dtype)
