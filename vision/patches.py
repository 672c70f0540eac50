"""Pictures cut into patches, and the angles by which attention distinguishes them.

Shapes: n tiles, S pixels a side, P pixels of a patch, G = S / P patches a side, d head width.
"""

import torch
from torch import Tensor

from llm.layers.rope import inverse_frequencies, rotation


def unfolded(tiles: Tensor, patch_size: int) -> Tensor:
    """(n, 3, S, S') -> (n, G G', 3 P^2): patches row by row, the pixels of one ordered by channel, row and column."""
    n, channels, height, width = tiles.shape
    rows, columns = height // patch_size, width // patch_size
    cut = tiles.view(n, channels, rows, patch_size, columns, patch_size)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(n, rows * columns, channels * patch_size**2)


def places(rows: int, columns: int, device: torch.device) -> Tensor:
    """(column, row) of each patch of a grid, row by row, both counted from 1; (2, rows * columns) int64."""
    column, row = (torch.arange(1, n + 1, device=device) for n in (columns, rows))
    return torch.stack([column.repeat(rows), row.repeat_interleave(columns)])


def angles(places_2L: Tensor, head_dim: int, theta: float) -> Tensor:
    """By what heads are rotated, complex64 (1, L, 1, d / 2): the first half of a patch's pairs by its column, the other
    half by its row; at 0, where no patch is, not at all.
    """
    frequency = inverse_frequencies(head_dim // 2, theta, None)
    return torch.cat([rotation(along[None], frequency) for along in places_2L], dim=-1)
