"""A picture of any mode as red, green and blue levels of 8 bits.

Where `transformers` would clip or blacken, this does not: 16-bit levels are divided by 257 (theirs becomes white), and
what is transparent lies on white, as in Meta's code. Profiles of colour are not applied.
"""

import numpy as np
from PIL import Image

from llm.errors import UserError

SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")
"""Pillow's modes of grey levels up to 65535; `I` has 32 bits, of which files with 16 use the lower ones."""
STRAIGHT = {"La": "LA", "RGBa": "RGBA"}
"""Modes whose colours are multiplied by their alpha, and those with the colours as they are."""


def rgb(image: Image.Image) -> Image.Image:
    """The picture in mode RGB; itself where it is. UserError on floats, on levels beyond 16 bits, and on modes that
    Pillow has no way from.
    """
    if image.mode in SIXTEEN_BIT:
        return _from_16_bits(image)
    if image.mode == "F":
        raise UserError("has floats as pixels, of which no one knows which is white; store it with 8 or 16 bits")
    if image.has_transparency_data:
        return _on_white(image.convert(STRAIGHT.get(image.mode, image.mode)).convert("RGBA"))
    try:
        return image if image.mode == "RGB" else image.convert("RGB")
    except ValueError as error:
        raise UserError(f"has pixels of mode {image.mode}: {error}") from None


def _from_16_bits(image: Image.Image) -> Image.Image:
    levels = np.array(image).astype(np.int64)
    if levels.size and not 0 <= levels.min() <= levels.max() <= 65535:
        raise UserError(f"has levels from {levels.min()} to {levels.max()}; what 16 bits hold ends at 65535")
    grey = ((levels + 128) // 257).astype(np.uint8)
    if isinstance(clear := image.info.get("transparency"), int):
        grey[levels == clear] = 255
    return Image.fromarray(grey).convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.getchannel("A"))
    return white
