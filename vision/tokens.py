"""The control tokens that stand for an image in a text, by Llama 4's names."""

from dataclasses import dataclass
from typing import Self

from llm.errors import UserError
from llm.tokenizers.base import Tokenizer

NAMES = {
    "image_start": "<|image_start|>",
    "image_end": "<|image_end|>",
    "tile_x_separator": "<|tile_x_separator|>",
    "tile_y_separator": "<|tile_y_separator|>",
    "image": "<|image|>",
    "patch": "<|patch|>",
}
"""Field of ImageTokens -> name in the tokenizer, in the order of their ids in Llama 4's."""


@dataclass(frozen=True)
class ImageTokens:
    """Ids of a tokenizer's control tokens for images."""

    image_start: int
    image_end: int
    tile_x_separator: int
    """between two tiles of a row"""
    tile_y_separator: int
    """after each row of tiles"""
    image: int
    """before the whole picture"""
    patch: int
    """a slot, which the tower's output fills: `tokens_per_tile` of them a tile"""

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Self:
        """UserError with the names that the tokenizer lacks."""
        known = tokenizer.control_tokens
        missing = [name for name in NAMES.values() if name not in known]
        if missing:
            raise UserError(f"the tokenizer has no {', '.join(missing)}, which images in a text need")
        return cls(**{field: known[name] for field, name in NAMES.items()})
