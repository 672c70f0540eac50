"""Root-mean-square norm (Zhang and Sennrich 2019, arXiv:1910.07467), computed in float32 whatever the input is.

Written with its own backward because the composed one walks the tensor about twice as often, and on a CPU that is what
costs.

Shapes: N rows, D normalised width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), cast back to the input's dtype, then times the weight (the order of Llama 2 to 4)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_normalise(x, self.eps, self.weight)


def rms_normalise(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    """RMS-normalise the last dimension of x, and multiply by weight (D,) if given. Same shape and dtype as x."""
    return _RMSNormalise.apply(x, weight, eps)


class _RMSNormalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        wide = _accumulation_dtype(x)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        y = (x.to(wide) * scale).to(x.dtype)
        return y if weight is None else y.mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        width = x.shape[-1]
        x_ND, grad_ND, scale_N1 = x.reshape(-1, width).to(scale.dtype), grad.reshape(-1, width), scale.view(-1, 1)
        grad_ND = grad_ND.to(scale.dtype)
        product_ND = grad_ND * x_ND
        if weight is None:
            grad_weight = None
            along_N1 = product_ND.sum(-1, keepdim=True)
            grad_x_ND = grad_ND * scale_N1
        else:
            wide_weight = weight.to(scale.dtype)
            grad_weight = torch.mv(product_ND.t(), scale_N1.view(-1)).to(weight.dtype)
            along_N1 = torch.mv(product_ND, wide_weight).unsqueeze(-1)
            grad_x_ND = torch.mul(grad_ND, wide_weight, out=product_ND).mul_(scale_N1)
        grad_x_ND.addcmul_(x_ND, along_N1.mul_(scale_N1.pow(3)).div_(-width))
        return grad_x_ND.to(x.dtype).view_as(x), grad_weight, None


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
