"""Pictures, rows that name them, and a model's way of reading them, for tests."""

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from llm.data.kinds import Asked
from llm.tokenizer import ByteTokenizer
from llm.tokenizers.extended import ExtendedTokenizer
from tests.data.sample_helpers import chat
from vision.tokens import NAMES, ImageTokens

CHATML = ("<|im_start|>", "<|im_end|>")
TOKENIZER = ExtendedTokenizer(ByteTokenizer(), [*CHATML, *NAMES.values()])
MARKS = ImageTokens.of(TOKENIZER)
SIDE, SLOTS = 8, 4
VISION: Any = SimpleNamespace(kind="tiles", image_size=SIDE, tokens_per_tile=SLOTS, max_tiles=4, patch_token_id=-1)
ONE_TILE, THREE_TILES = (SIDE, SIDE), (2 * SIDE, SIDE)
"""Width and height of pictures that become so many tiles."""


def picture(size: tuple[int, int] = ONE_TILE, seed: int = 0) -> bytes:
    """A PNG of random colours."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def put(path: Path, content: bytes) -> str:
    """A file of this content; its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path.name


def asked_with_vision(folder: Path, seq_len: int = 128, **more: Any) -> Asked:
    """What a run of a model with vision asks, its conversations being in ChatML."""
    options = {"seed": 0, "chat": chat(template="chatml"), "vision": VISION, **more}
    return Asked(TOKENIZER, folder / "cache", seq_len, **options)
