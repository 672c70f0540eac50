"""In which dtype sums are taken."""

import torch
from torch import Tensor


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums over x: float32 at least."""
    return torch.promote_types(x.dtype, torch.float32)
