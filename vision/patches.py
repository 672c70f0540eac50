"""Tiles cut into patches, and the angles by which attention tells them apart.

Shapes: n tiles, S pixels a side, P pixels of a patch, G = S / P patches a side, d head width.
"""

import torch
from torch import Tensor

from llm.layers.rope import inverse_frequencies, rotation


def unfolded(tiles: Tensor, patch_size: int) -> Tensor:
    """(n, 3, S, S) -> (n, G^2, 3 P^2): patches row by row, the pixels of one ordered by channel, row and column."""
    n, channels, side, _ = tiles.shape
    grid = side // patch_size
    cut = tiles.view(n, channels, grid, patch_size, grid, patch_size)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(n, grid**2, channels * patch_size**2)


def angles(grid: int, head_dim: int, theta: float, device: torch.device) -> Tensor:
    """By what heads are rotated, complex64 (1, G^2 + 1, 1, d / 2): the first half of a patch's pairs by its column
    counted from 1, the other half by its row; those of the class token, which is last, not at all.
    """
    frequency = inverse_frequencies(head_dim // 2, theta, None)
    counted = torch.arange(1, grid + 1, device=device)
    nowhere = counted.new_zeros(1)
    columns, rows = torch.cat([counted.repeat(grid), nowhere]), torch.cat([counted.repeat_interleave(grid), nowhere])
    return torch.cat([rotation(places[None], frequency) for places in (columns, rows)], dim=-1)
