"""Pictures from files and bytes that anyone may have made: looked at before they are decoded.

What a file says of its size in bytes and pixels is compared with limits first, so that a small file which unpacks into
gigabytes costs nothing. Formats are few: some others start programs (EPS) or decode while they are opened.
"""

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageOps

from llm.errors import UserError
from vision.colours import rgb

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
MOST_PIXELS = 178_956_970
"""Pillow opens nothing larger, whatever the limit."""
DAMAGED = (
    OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, ArithmeticError, RuntimeError, struct.error,
    zlib.error,
)  # fmt: skip
"""What Pillow raises, by format, where a file is not what its beginning says."""
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # from half that size on; the limit here is ImageLimits


@dataclass(frozen=True)
class ImageLimits:
    """What a picture may take before it is refused."""

    max_pixels: int = 64_000_000
    """width times height, as its header says"""
    max_bytes: int = 32 << 20
    """of its file"""

    def __post_init__(self) -> None:
        if not 0 < self.max_pixels <= MOST_PIXELS:
            raise ValueError(f"max_pixels={self.max_pixels} is not from 1 to {MOST_PIXELS}")
        if self.max_bytes < 1:
            raise ValueError(f"max_image_bytes={self.max_bytes} is less than 1")


LIMITS = ImageLimits()
"""Where nothing else is said."""


@dataclass(frozen=True, eq=False)
class Opened:
    """A picture that the caller has opened, as it stands: of an animation, the frame that it is at."""

    image: Image.Image


Source = Path | bytes | Opened
"""A file, what a file holds, or neither."""


def open_image(source: Source, limits: ImageLimits = LIMITS) -> Image.Image:
    """The picture in mode RGB, turned as its EXIF data say, of an animation in a file the first frame. UserError,
    without the name of the file, where it is missing, larger than the limits, of another format or damaged.
    """
    with _stream(source, limits.max_bytes) as stream:
        try:
            if isinstance(stream, Opened):
                _check_size(stream.image, limits)
                return rgb(ImageOps.exif_transpose(stream.image))
            with Image.open(stream, formats=FORMATS) as image:
                _check_size(image, limits)
                ImageOps.exif_transpose(image, in_place=True)  # decodes it first
                return rgb(image)
        except Image.DecompressionBombError:
            raise UserError(f"has over {MOST_PIXELS} pixels, more than max_pixels={limits.max_pixels}") from None
        except Image.UnidentifiedImageError:
            raise UserError(f"is no picture of a known format ({', '.join(FORMATS)})") from None
        except DAMAGED as error:
            raise UserError(f"cannot be decoded: {error}") from None


def file_under(root: Path, name: str) -> Path:
    """The file of that name in a folder or below it. UserError where the name, or a link on its way, leads out."""
    try:
        found, folder = (root / name).resolve(), root.resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"image {name!r} is no path: {error}") from None
    if not found.is_relative_to(folder):
        raise UserError(f"image {name!r} is outside image_root {root}")
    return found


def _check_size(image: Image.Image, limits: ImageLimits) -> None:
    if image.width * image.height > limits.max_pixels:
        raise UserError(f"has {image.width} x {image.height} pixels, more than max_pixels={limits.max_pixels}")


@contextmanager
def _stream(source: Source, max_bytes: int) -> Iterator[BinaryIO | Opened]:
    if isinstance(source, Opened):
        yield source
        return
    if isinstance(source, bytes):
        _check(len(source), max_bytes)
        yield io.BytesIO(source)
        return
    try:
        if not source.is_file():
            raise UserError("is no file" if source.exists() else "does not exist")
        _check(source.stat().st_size, max_bytes)
        stream = source.open("rb")
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}") from None
    with stream:
        yield stream


def _check(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise UserError(f"has {size} bytes, more than max_image_bytes={max_bytes}")
