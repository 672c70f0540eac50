"""The token ids that stand for an image."""

from types import SimpleNamespace

import pytest

from llm.errors import UserError
from llm.tokenizers.extended import ExtendedTokenizer
from llm.tokenizers.simple import ByteTokenizer
from vision.preprocess import filled, image_text
from vision.tokens import NAMES, ImageTokens

TOKENIZER = ExtendedTokenizer(ByteTokenizer(), list(NAMES.values()))
MARKS = ImageTokens.of(TOKENIZER)


def model(patch_token_id: int = -1) -> SimpleNamespace:
    return SimpleNamespace(tokens_per_tile=2, patch_token_id=patch_token_id)


def spelled(ids: list[int]) -> str:
    letters = {MARKS.image_start: "[", MARKS.image_end: "]", MARKS.image: "I", MARKS.patch: "p",
               MARKS.tile_x_separator: "x", MARKS.tile_y_separator: "y"}  # fmt: skip
    return "".join(letters[i] for i in ids)


@pytest.mark.parametrize(
    "grid, text",
    [((1, 1), "[Ipp]"), ((1, 2), "[ppxppyIpp]"), ((2, 1), "[ppyppyIpp]"), ((2, 3), "[ppxppxppyppxppxppyIpp]")],
)
def test_separators_stand_between_tiles_and_after_rows_and_the_whole_picture_comes_last(grid, text):
    assert spelled(image_text(grid, model(), TOKENIZER)) == text


def test_a_tokenizer_without_the_marks_is_refused_with_their_names():
    with pytest.raises(UserError, match=r"no <\|image_start\|>, .*<\|patch\|>, which images"):
        image_text((1, 1), model(), ByteTokenizer())


def test_another_slot_in_the_model_than_in_the_tokenizer_is_refused():
    assert image_text((1, 1), model(MARKS.patch), TOKENIZER)
    with pytest.raises(UserError, match=f"patch_token_id=3 is not the id of .* {MARKS.patch}"):
        image_text((1, 1), model(3), TOKENIZER)


def test_each_placeholder_becomes_the_text_of_its_image():
    ids = [7, MARKS.image, 8, MARKS.image]
    expected = [7, *image_text((1, 2), model(), TOKENIZER), 8, *image_text((1, 1), model(), TOKENIZER)]
    assert filled(ids, [(1, 2), (1, 1)], model(), TOKENIZER) == expected
    for grids in ([(1, 1)], [(1, 1)] * 3):
        with pytest.raises(UserError, match=f"has 2 placeholders for {len(grids)} image"):
            filled(ids, grids, model(), TOKENIZER)
