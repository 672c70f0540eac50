"""Pictures that are a pure function of numbers, so that a digest of their tiles holds on every machine."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def levels(height: int, width: int, number: int) -> NDArray[np.uint8]:
    """uint8 (height, width, 3): slopes, fine stripes and steps, of integers alone; another picture for each number."""
    y, x, c = np.ogrid[:height, :width, :3]
    slope = x * (3 + number) + y * (5 + 2 * number)
    stripes = (x * y) % 251 * (c + 1)
    steps = (x * x * 31 + y * y * 17) // (101 + number)
    return ((slope + stripes + steps + 91 * c) & 255).astype(np.uint8)


def picture(height: int, width: int, number: int = 0) -> Image.Image:
    return Image.fromarray(levels(height, width, number))
