"""Images of samples: where a row names one, under which folder it may lie, and what becomes of it.

Shapes: n tiles, S pixels a side of a tile.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from llm.data.image_source import ImageSource
from llm.data.sample import Sample
from llm.data.samples import ImagesEntry
from llm.errors import UserError
from llm.tokenizer import Tokenizer
from vision.opening import ImageLimits, file_under, open_image
from vision.preprocess import image_text
from vision.tiles import cut
from vision.tokens import ImageTokens

if TYPE_CHECKING:
    from llm.args.vision import VisionArgs

IMAGES_VERSION = 1
"""Raise it when the same image would give other tiles or token ids."""


@dataclass(frozen=True)
class ImageOptions:
    """What a run says of images, under `data`."""

    root: str | None = None
    """`image_root`: None = the folder of the file that a row stands in."""
    limits: ImageLimits = ImageLimits()
    """`max_pixels` and `max_image_bytes`."""
    bad: Literal["error", "drop"] = "error"
    """`bad_images`."""


class BrokenImage(UserError):
    """An image that is missing, too large or damaged: `data.bad_images` says what becomes of its row."""


@dataclass(frozen=True)
class CutImage:
    """An image as the model reads it."""

    tiles: NDArray[np.uint8]
    """(n, 3, S, S)"""
    ids: Sequence[int]
    """Tokens that stand for it, slots among them."""


class ImageReader:
    """Opens and cuts the images of a source. fingerprint: all that decides what becomes of an image, as JSON can hold
    it.
    """

    def __init__(
        self, vision: "VisionArgs", tokenizer: Tokenizer, options: ImageOptions, folder: Path | None = None
    ) -> None:
        """folder: where relative paths begin if `data.image_root` names no other. UserError where the tokenizer lacks
        the tokens of images, there is no such root, or the tower reads no tiles.
        """
        self.vision, self.tokenizer, self.options = vision, tokenizer, options
        if vision.kind != "tiles":
            raise UserError(f"model.vision.kind={vision.kind} reads images whole; rows with images hold tiles")
        self.marks = ImageTokens.of(tokenizer)
        self.root = folder if options.root is None else Path(options.root)
        if options.root is not None and not Path(options.root).is_dir():
            raise UserError(f"data.image_root={options.root}: no such folder")
        root = None if options.root is None else str(Path(options.root).resolve())
        limits = options.limits
        shape = [vision.image_size, vision.max_tiles, vision.tokens_per_tile]
        self.fingerprint = [IMAGES_VERSION, *shape, root, limits.max_pixels, limits.max_bytes, options.bad]

    def beside(self, folder: Path) -> "ImageReader":
        """The same for rows of a file in this folder."""
        return ImageReader(self.vision, self.tokenizer, self.options, folder)

    def entry(self) -> ImagesEntry:
        """What the manifest says of the images."""
        vision = self.vision
        return ImagesEntry(
            image_size=vision.image_size, tokens_per_tile=vision.tokens_per_tile, patch_token_id=self.marks.patch
        )

    def contents(self, sources: Sequence[ImageSource]) -> list[bytes]:
        """The files of a row's images. UserError saying which lies outside the root; BrokenImage saying which cannot be
        read, or is too large.
        """
        return [self._content(source, _called(number, source)) for number, source in enumerate(sources, 1)]

    def cut(self, contents: Sequence[bytes], sources: Sequence[ImageSource]) -> list[CutImage]:
        """The images of a row. BrokenImage saying which cannot be decoded, or has too many pixels."""
        found = []
        for number, (content, source) in enumerate(zip(contents, sources, strict=True), 1):
            try:
                image = open_image(content, self.options.limits)
            except UserError as error:
                raise BrokenImage(f"{_called(number, source)} {error}") from None
            tiles, grid = cut(image, self.vision)
            found.append(CutImage(tiles, image_text(grid, self.vision, self.tokenizer)))
        return found

    def _content(self, source: ImageSource, called: str) -> bytes:
        most = self.options.limits.max_bytes
        if isinstance(source, bytes):
            return source
        if "://" in source:
            raise UserError(f"{called} is an address; only files are read: fetch it and name its path")
        if self.root is None:
            raise UserError(f"{called} is a path, and there is no folder that it begins at (data.image_root)")
        path = file_under(self.root, source)
        try:
            if not path.is_file():
                raise BrokenImage(f"{called} {'is no file' if path.exists() else 'does not exist'} under {self.root}")
            if (size := path.stat().st_size) > most:
                raise BrokenImage(f"{called} has {size} bytes, more than max_image_bytes={most}")
            return path.read_bytes()
        except OSError as error:
            raise BrokenImage(f"{called} cannot be read ({error.strerror or error})") from None


def digests(contents: Sequence[bytes]) -> list[str]:
    """What images are known by: the blake2b-128 of their files."""
    return [hashlib.blake2b(content, digest_size=16).hexdigest() for content in contents]


def filled(sample: Sample, images: Sequence[CutImage], image_id: int) -> Sample:
    """The sample with the tokens of an image in the place of each token `image_id`, in order, and with the tiles of
    all. Nothing of an image is a target. UserError where there are more or fewer such places than images.
    """
    (places,) = np.nonzero(sample.tokens == image_id)
    if len(places) != len(images):
        raise UserError(f"its text has {len(places)} places for images, and it has {len(images)} images")
    if not images:
        return sample
    counts = np.ones(len(sample.tokens), dtype=np.int64)
    counts[places] = [len(image.ids) for image in images]
    ends = np.cumsum(counts)
    weights = sample.weights.copy()
    weights[places] = 0
    tokens = np.repeat(sample.tokens, counts)
    for place, image in zip(places.tolist(), images, strict=True):
        tokens[ends[place] - counts[place] : ends[place]] = image.ids
    return replace(
        sample,
        tokens=tokens,
        weights=np.repeat(weights, counts),
        turn_ends=ends[sample.turn_ends - 1],
        images=np.concatenate([image.tiles for image in images]),
    )


def _called(number: int, source: ImageSource) -> str:
    name = f" ({source})" if isinstance(source, str) else ""
    return f"its image {number}{name}"
