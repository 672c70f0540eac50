"""The images of prompts: looked at when a prompt is read, so that a bad one is refused then, and cut into tiles again
when it is continued, so that those of a long file are never all in memory.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from llm.args.vision import VisionArgs
from llm.data.conversation import PLACEHOLDER
from llm.errors import UserError
from llm.tokenizers.base import Tokenizer
from vision.opening import ImageLimits, Opened, Source, file_under, open_image
from vision.preprocess import filled
from vision.tiles import Grid, cut, n_tiles
from vision.tokens import NAMES

KEPT = 32
"""Images whose tiles are kept for the next prompt that has them."""


@dataclass(frozen=True)
class Picture:
    """An image of a prompt."""

    source: Source
    name: str
    """for errors"""
    grid: Grid
    digest: str
    """of its tiles"""


class Pictures:
    """Images as a model reads them."""

    def __init__(self, vision: VisionArgs | None, model: str, limits: ImageLimits) -> None:
        """vision: None = it reads text only. model: its name, for errors."""
        self._vision, self._model, self._limits = vision, model, limits
        self._cut = lru_cache(KEPT)(self._cut_source)

    def look(self, source: Source, name: str) -> Picture:
        """An image, which is decoded and cut once. UserError, which begins with its name, where that cannot be."""
        if self._vision is None:
            raise UserError(f"{name} is for a model with vision; {self._model} reads text only (model.vision)")
        tiles, grid = self._tiles(source, name)
        return Picture(source, name, grid, hashlib.blake2b(tiles.tobytes(), digest_size=16).hexdigest())

    def given(self, sources: Sequence[object], prompt: str) -> list[Picture]:
        """Images that a program has: paths, what files hold, or what Pillow has opened. UserError as of `look`,
        ValueError on anything else; both begin with the prompt's name."""
        try:
            return [self.look(*_given(source, number)) for number, source in enumerate(sources, 1)]
        except (UserError, ValueError) as error:
            raise type(error)(f"{prompt}: {error}") from None

    def under(self, root: Path, sources: Sequence[str | bytes]) -> list[Picture]:
        """Images by their paths in a folder, or as they are in files. UserError as of `look`, and where a path leads
        out of the folder."""
        return [
            self.look(source, f"image {number}")
            if isinstance(source, bytes)
            else self.look(file_under(root, source), f"image {source!r}")
            for number, source in enumerate(sources, 1)
        ]

    def tiles(self, pictures: Sequence[Picture]) -> Tensor | None:
        """uint8 (n, 3, S, S) of images one after the other; None where there are none. UserError where one is no
        longer what it was."""
        if not pictures:
            return None
        found = []
        for picture in pictures:
            tiles, grid = self._tiles(picture.source, picture.name)
            if grid != picture.grid:
                raise UserError(f"{picture.name} has changed since it was looked at")
            found.append(torch.from_numpy(tiles))
        return torch.cat(found)

    def prompt_ids(self, text: str, pictures: Sequence[Picture], tokenizer: Tokenizer) -> list[int]:
        """A text as `tokenizer.prompt_ids` begins it, with the slots of its images where it says `<image>`, or before
        it. UserError on more or fewer placeholders than images."""
        if not pictures:
            return tokenizer.prompt_ids(text)
        marked = placed(text, len(pictures)).replace(PLACEHOLDER, NAMES["image"])
        return self.filled(tokenizer.prompt_ids(marked), pictures, tokenizer)

    def filled(self, ids: list[int], pictures: Sequence[Picture], tokenizer: Tokenizer) -> list[int]:
        """The ids with the slots of the images in place of the token that stands for each. UserError on more or fewer
        of these than images."""
        if not pictures:
            return ids
        assert self._vision is not None
        return filled(ids, [picture.grid for picture in pictures], self._vision, tokenizer)

    def check_slots(self, ids: list[int], pictures: Sequence[Picture]) -> None:
        """UserError where ids spell slots that are no image's."""
        if self._vision is not None and self._vision.patch_token_id >= 0:
            slots = sum(n_tiles(picture.grid) for picture in pictures) * self._vision.tokens_per_tile
            if ids.count(self._vision.patch_token_id) != slots:
                raise UserError(f"spells {NAMES['patch']} itself, which stands for parts of images alone")

    def _tiles(self, source: Source, name: str) -> tuple[NDArray[np.uint8], Grid]:
        try:
            return self._cut(source)
        except UserError as error:
            raise UserError(f"{name} {error}") from None

    def _cut_source(self, source: Source) -> tuple[NDArray[np.uint8], Grid]:
        assert self._vision is not None
        return cut(open_image(source, self._limits), self._vision)


def _given(source: object, number: int) -> tuple[Source, str]:
    """What an image is read from, and its name for errors."""
    if isinstance(source, str | PathLike):
        return Path(source).expanduser(), f"image {str(source)!r}"
    if isinstance(source, bytes):
        return source, f"image {number}"
    if isinstance(source, Image.Image):
        return Opened(source), f"image {number}"
    raise ValueError(f"image {number} has type {type(source).__name__}; give a path, bytes, or an image of Pillow")


def placed(text: str, n_images: int) -> str:
    """A text in which `<image>` stands for each of its images: before it where it has none."""
    return text if PLACEHOLDER in text else PLACEHOLDER * n_images + text
