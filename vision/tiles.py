"""An image cut into square tiles: bit for bit those of `transformers`' Llama4ImageProcessor before it normalises.

The canvas is the grid of tiles, up to `max_tiles`, on which the picture keeps most of its detail with least padding.
The picture, its proportions kept, lies in the canvas' upper left corner, and the rest is black; small pictures grow to
one tile's side at most. Where the grid has several tiles, the whole picture squeezed into one follows as the last.

Shapes: n tiles, 3 channels, S pixels a side; H rows and W columns of pixels.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from llm.errors import UserError
from vision.colours import rgb
from vision.resize import resized

if TYPE_CHECKING:
    from llm.args.vision import VisionArgs

Grid = tuple[int, int]
"""Rows and columns of tiles."""


def cut(image: Image.Image, vision: "VisionArgs") -> tuple[NDArray[np.uint8], Grid]:
    """(tiles uint8 (n, 3, S, S), grid) of a picture of any mode: the grid's tiles row by row, then, where there are
    several, the whole picture. UserError on a mode whose colours are not known (see vision/colours.py), and for a
    tower that reads no tiles.
    """
    if vision.kind != "tiles":
        raise UserError(f"model.vision.kind={vision.kind} reads images whole; only LLM.forward takes such yet")
    height, width = image.height, image.width
    if not height or not width:
        raise ValueError(f"an image of {width} x {height} pixels has nothing to cut")
    pixels = torch.from_numpy(np.array(rgb(image))).permute(2, 0, 1).contiguous()
    side = vision.image_size
    grid = grid_for(height, width, side, vision.max_tiles)
    tiles = _split(_on_canvas(pixels, grid, side), grid, side)
    if len(tiles) > 1:
        tiles = torch.cat([tiles, resized(pixels, side, side)[None]])
    return tiles.numpy(), grid


def n_tiles(grid: Grid) -> int:
    """Tiles of an image: those of its grid and, where these are several, the whole picture."""
    rows, columns = grid
    return rows * columns + (rows * columns > 1)


def grid_for(height: int, width: int, side: int, max_tiles: int) -> Grid:
    """The grid of a picture of height x width pixels: of those that hold it whole, the one on which it grows least;
    where none does, the one on which it shrinks least; of equal ones the smallest.
    """
    grids = [(r, c) for r in range(1, max_tiles + 1) for c in range(1, max_tiles // r + 1)]
    rows_columns = np.array(grids, dtype=np.float32) * np.float32(side)
    # in single precision, as in transformers: which grids count as equal depends on it
    scales = (rows_columns / np.array([height, width], dtype=np.float32)).min(axis=1)
    whole = scales >= 1
    scale = scales[whole].min() if whole.any() else scales.max()
    return min((grid for grid, s in zip(grids, scales, strict=True) if s == scale), key=lambda grid: grid[0] * grid[1])


def size_on(canvas: tuple[int, int], height: int, width: int, side: int) -> tuple[int, int]:
    """(height, width) in pixels of a picture on its canvas, proportions kept and sides rounded down: no side grows
    beyond that of one tile, and none vanishes.
    """
    target_height, target_width = min(max(height, side), canvas[0]), min(max(width, side), canvas[1])
    down, across = _ratio(target_height, height), _ratio(target_width, width)
    if across < down:
        return max(min(int(height * across), target_height), 1), target_width
    return target_height, max(min(int(width * down), target_width), 1)


def _ratio(target: int, source: int) -> float | np.float32:
    """target / source, in single precision where it shrinks, as in transformers: a side on the edge of a whole number
    is rounded as there."""
    return np.float32(target) / np.float32(source) if target < source else target / source


def _on_canvas(pixels: Tensor, grid: Grid, side: int) -> Tensor:
    """uint8 (3, rows S, columns S): the picture in the upper left corner, black elsewhere."""
    canvas = (grid[0] * side, grid[1] * side)
    height, width = size_on(canvas, pixels.shape[1], pixels.shape[2], side)
    return pad(resized(pixels, height, width), (0, canvas[1] - width, 0, canvas[0] - height))


def _split(canvas: Tensor, grid: Grid, side: int) -> Tensor:
    """(3, rows S, columns S) -> (rows columns, 3, S, S), row by row."""
    rows, columns = grid
    tiles = canvas.view(3, rows, side, columns, side).permute(1, 3, 0, 2, 4)
    return tiles.reshape(rows * columns, 3, side, side)
