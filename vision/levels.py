"""The pixels of a tile: uint8 levels, as rows store and ranks move them, and the floats that the tower reads.

Shapes: n tiles, 3 channels (red, green, blue), S pixels a side.
"""

from torch import Tensor

MEAN, STD = 0.5, 0.5
"""Of every channel, as the released Llama 4 was trained."""


def normalised(levels: Tensor) -> Tensor:
    """uint8 levels of any shape as float32 from -1 (black) to 1 (white), on the device where they are."""
    return (levels.float() / 255 - MEAN) / STD
