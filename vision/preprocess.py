"""What a model with vision reads of a picture: tiles of pixels, and the token ids that stand for it in a text."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from llm.errors import UserError
from llm.tokenizers.base import Tokenizer
from vision.levels import normalised
from vision.tiles import Grid, cut
from vision.tokens import ImageTokens

if TYPE_CHECKING:
    from llm.args.vision import VisionArgs


def image_tiles(image: Image.Image, vision: "VisionArgs") -> tuple[Tensor, Grid]:
    """(tiles float32 (n, 3, S, S) from -1 to 1, (rows, columns)) of a picture of any mode, as `vision.tiles.cut` cuts
    it. UserError on a mode whose colours are not known.
    """
    levels, grid = cut(image, vision)
    return normalised(torch.from_numpy(levels)), grid


def image_text(grid: Grid, vision: "VisionArgs", tokenizer: Tokenizer) -> list[int]:
    """Ids that stand for an image cut into `grid`: a slot for each vector that the tower gives, in the order of the
    tiles, and the marks around them. UserError on a tokenizer without those, or whose slot is not the model's.
    """
    marks = ImageTokens.of(tokenizer)
    if vision.patch_token_id not in (-1, marks.patch):
        raise UserError(
            f"model.vision.patch_token_id={vision.patch_token_id} is not the id of <|patch|> in the tokenizer, "
            f"{marks.patch}"
        )
    rows, columns = grid
    tile = [marks.patch] * vision.tokens_per_tile
    row = [*tile, *([marks.tile_x_separator, *tile] * (columns - 1)), marks.tile_y_separator]
    tiles = row * rows if rows * columns > 1 else []
    return [marks.image_start, *tiles, marks.image, *tile, marks.image_end]


def filled(ids: Sequence[int], grids: Sequence[Grid], vision: "VisionArgs", tokenizer: Tokenizer) -> list[int]:
    """The ids with each `<|image|>`, which stands for one image, replaced by the `image_text` of its grid, in their
    order. UserError on more or fewer of them than grids, and as of `image_text`.
    """
    marks = ImageTokens.of(tokenizer)
    places = [place for place, number in enumerate(ids) if number == marks.image]
    if len(places) != len(grids):
        raise UserError(f"has {_counted(len(places), 'placeholder')} for {_counted(len(grids), 'image')}")
    found: list[int] = []
    begin = 0
    for place, grid in zip(places, grids, strict=True):
        found += [*ids[begin:place], *image_text(grid, vision, tokenizer)]
        begin = place + 1
    return [*found, *ids[begin:]]


def _counted(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"
