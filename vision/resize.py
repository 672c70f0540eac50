"""Antialiased bilinear resize of uint8 pixels, with the same levels on every CPU.

It is torch's kernel on uint8, which the image processors of `transformers` end in on CPUs with vector units: resizing
floats and rounding differs from it by up to a level.

Shapes: 3 channels, H rows, W columns of pixels.
"""

from torch import Tensor
from torch.nn.functional import interpolate


def resized(pixels: Tensor, height: int, width: int) -> Tensor:
    """uint8 (3, H, W) -> uint8 (3, height, width)."""
    if tuple(pixels.shape[1:]) == (height, width):
        return pixels
    if width == 1 and height > 1:
        # torch 2.13's vector kernels write wrong levels where the output has one column (its kernel for other CPUs
        # does not): lying on its side, first to one column and then along it, the picture goes through none of them
        lying = _interpolated(pixels.mT.contiguous(), 1, pixels.shape[1])
        return _interpolated(lying, 1, height).mT.contiguous()
    return _interpolated(pixels, height, width)


def _interpolated(pixels: Tensor, height: int, width: int) -> Tensor:
    return interpolate(pixels[None], size=(height, width), mode="bilinear", antialias=True, align_corners=False)[0]
