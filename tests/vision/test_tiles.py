"""Pictures cut into tiles: bit for bit as `transformers` cuts them, whose digests `make vision-reference` recorded."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from llm.errors import UserError
from tests.shared import SHARED, needs_shared
from tests.vision.pictures import levels, picture
from tests.vision.reference import FILE, Case, cases, digest, name, number, sizes
from vision.preprocess import image_tiles
from vision.resize import resized
from vision.tiles import Grid, cut, grid_for, n_tiles, size_on

GOLDEN = json.loads(FILE.read_text())


def model(side: int, max_tiles: int = 16) -> SimpleNamespace:
    return SimpleNamespace(kind="tiles", image_size=side, max_tiles=max_tiles)


def becomes_one_pixel_wide(case: Case) -> bool:
    height, width, side, max_tiles = case
    rows, columns = grid_for(height, width, side, max_tiles)
    return size_on((rows * side, columns * side), height, width, side)[1] == 1


SOUND = [case for case in cases() if not becomes_one_pixel_wide(case)]
"""Cases in which transformers' levels are those of the picture."""


@pytest.mark.parametrize("side", sorted({case[2] for case in cases()}))
def test_tiles_and_their_order_are_bit_for_bit_those_of_transformers(side):
    for case in (case for case in SOUND if case[2] == side):
        height, width, _, max_tiles = case
        tiles, grid = cut(picture(height, width, number(case)), model(side, max_tiles))
        assert [*grid, digest(tiles.tobytes())] == GOLDEN["tiles"][name(case)], name(case)
        assert len(tiles) == n_tiles(grid)


def test_every_reference_is_of_a_case_that_is_compared():
    assert list(GOLDEN["tiles"]) == list(dict.fromkeys(map(name, SOUND)))


def test_grids_and_sizes_on_them_are_rounded_as_in_transformers():
    found = []
    for height, width, side, max_tiles in sizes():
        grid = grid_for(height, width, side, max_tiles)
        found.append([*grid, *size_on((grid[0] * side, grid[1] * side), height, width, side)])
    assert digest(np.array(found, dtype=np.int32).tobytes()) == GOLDEN["layouts"]


def test_a_column_alone_is_resized_like_one_beside_its_copies():
    column = torch.from_numpy(levels(900, 1, 3)).permute(2, 0, 1).contiguous()
    beside = resized(column.expand(3, 900, 8).contiguous(), 336, 8)
    assert torch.equal(resized(column, 336, 1), beside[:, :, :1])


def test_tiles_are_normalised_between_minus_one_and_one():
    tiles, grid = image_tiles(Image.new("RGB", (28, 20), (0, 255, 51)), model(28))
    assert grid == (1, 1) and tiles.shape == (1, 3, 28, 28) and tiles.dtype == torch.float32
    assert tiles[0, :, 0, 0].tolist() == [-1.0, 1.0, pytest.approx(-0.6, abs=1e-7)]  # one float32 rounding of 0.2
    assert (tiles[0, :, 20:] == -1).all()  # below the picture the canvas is black


def test_an_empty_picture_is_refused():
    with pytest.raises(ValueError, match="0 x 5 pixels"):
        cut(Image.new("RGB", (0, 5)), model(28))


def test_a_tower_that_reads_pictures_whole_gets_no_tiles():
    with pytest.raises(UserError, match="model.vision.kind=native reads images whole"):
        cut(picture(5, 5, 0), SimpleNamespace(kind="native"))


def by_pillow(image: Image.Image, side: int, grid: Grid) -> NDArray[np.uint8]:
    """Meta's transform written plainly, on a canvas that is given: Pillow's own resize, zeros to the right and below,
    tiles by rows, and the picture squeezed into one tile last.
    """
    rows, columns = grid
    height, width = size_on((rows * side, columns * side), image.height, image.width, side)
    canvas = Image.new("RGB", (columns * side, rows * side))
    canvas.paste(image.resize((width, height), Image.Resampling.BILINEAR), (0, 0))
    tiles = [
        canvas.crop((c * side, r * side, (c + 1) * side, (r + 1) * side)) for r in range(rows) for c in range(columns)
    ]
    if len(tiles) > 1:
        tiles.append(image.resize((side, side), Image.Resampling.BILINEAR))
    return np.stack([np.asarray(tile).transpose(2, 0, 1) for tile in tiles])


def within_a_level(image: Image.Image, side: int, max_tiles: int) -> None:
    ours, grid = cut(image, model(side, max_tiles))
    # both round after each of the two passes, and their weights have other precisions
    assert np.abs(ours.astype(int) - by_pillow(image, side, grid)).max() <= 1, (image.size, side, max_tiles)


@pytest.mark.parametrize("one_wide", [False, True], ids=["wider than a pixel", "one pixel wide"])
def test_metas_transform_by_pillow_is_within_one_level(one_wide):
    compared = [case for case in cases() if case[2] < 336 and becomes_one_pixel_wide(case) == one_wide]
    for height, width, side, max_tiles in compared:
        within_a_level(picture(height, width, 2), side, max_tiles)


@needs_shared
@pytest.mark.parametrize("file", ["photos/dog.jpg", "photos/pasta.jpeg", "mllm_demo/mllm_demo_data/1.jpg"])
def test_metas_transform_is_within_one_level_on_photographs(file):
    path = SHARED / "data" / "images" / file
    if not path.exists():
        pytest.skip(f"{file} is not there")
    within_a_level(Image.open(path).convert("RGB"), 336, 16)
