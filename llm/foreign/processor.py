"""How a Hugging Face folder of a model with vision says how pictures become tiles: preprocessor_config.json (of the
image processor) and processor_config.json (of it with a tokenizer; of transformers 5 with the former inside).
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llm.args import ModelArgs
from llm.errors import UserError
from llm.foreign.weight_files import read_json
from llm.tokenizer import Tokenizer
from llm.tokenizers.folder import foreign_tokenizer
from vision.tokens import NAMES

IMAGE, BOTH = "preprocessor_config.json", "processor_config.json"
FILES = (IMAGE, BOTH)
PATCH_TOKEN, PATCH_ID = NAMES["patch"], 200092
"""A slot's token, and its id in Llama 4's own tokenizer."""
TILES: dict[str, Any] = {
    "do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "resample": 2,
    "rescale_factor": 1 / 255, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    "resize_to_max_canvas": False,
}  # fmt: skip
"""What an image processor must say for its tiles to be ours; also its defaults."""
TOKENS = {
    "fake_image_token": NAMES["image"],
    "image_token": NAMES["image"],
    "start_of_image_token": NAMES["image_start"],
    "end_of_image_token": NAMES["image_end"],
    "patch_token": NAMES["patch"],
    "tile_x_separator_token": NAMES["tile_x_separator"],
    "tile_y_separator_token": NAMES["tile_y_separator"],
}
"""Keys of Llama4Processor."""


def settle(vision: dict[str, Any], path: Path, vocab_size: int, given: Mapping[str, Any]) -> Iterator[str]:
    """Put into keys of VisionArgs what a folder's processor and tokenizer say of them: most tiles of a picture, the id
    of a slot. Lines on what a processor does otherwise than ours. given: keys that are settled otherwise."""
    if vision.get("kind") == "native":  # pictures are not made into tiles
        return
    file, image, both = _settings(path)
    if image.get("max_patches") is not None:
        vision["max_tiles"] = image["max_patches"]
    side = vision["image_size"]
    expected = {**TILES, "size": {"height": side, "width": side}}
    for key, value in expected.items():
        if image.get(key) is not None and not _same(image[key], value):
            yield f"{file}: {key}={image[key]}, but pictures are made into tiles here by {value}"
    for key, value in {**TOKENS, "patch_size": vision["patch_size"]}.items():
        if both.get(key) is not None and both[key] != value:
            yield f"{BOTH}: {key}={both[key]}, but images in a text are written here by {value}"
    if "patch_token_id" not in {**vision, **given}:
        yield from _slot_of_tokenizer(vision, path, vocab_size)


def _settings(path: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Name of the file that describes the image processor, what it says, and what is said of the whole processor."""
    both = read_json(path / BOTH) if (path / BOTH).is_file() else {}
    inner = both.get("image_processor")
    if isinstance(inner, dict):
        return BOTH, inner, both
    return IMAGE, read_json(path / IMAGE) if (path / IMAGE).is_file() else {}, both


def _same(stated: Any, value: Any) -> bool:
    """Whether a setting means a value: a size by its two sides, a factor up to what decimal digits leave of it."""
    if isinstance(value, dict):
        return isinstance(stated, dict) and all(stated.get(key) == side for key, side in value.items())
    if isinstance(value, float):
        return isinstance(stated, float) and abs(stated - value) < 1e-9
    return bool(stated == value)


def _slot_of_tokenizer(vision: dict[str, Any], path: Path, vocab_size: int) -> Iterator[str]:
    """The id of a slot, of a folder whose config leaves it to the tokenizer; without one Llama 4's own or, in a smaller
    vocabulary, the last, which a line says."""
    try:
        found = foreign_tokenizer(path)[0].control_tokens.get(PATCH_TOKEN)
    except UserError:
        found = None
    if found is None:
        found = PATCH_ID if vocab_size > PATCH_ID else vocab_size - 1
        yield (
            f"no tokenizer with {PATCH_TOKEN} beside it, which stands for images: taken as id {found}; give another as "
            f"--set=vision.patch_token_id=ID"
        )
    vision["patch_token_id"] = found


def files_of(args: ModelArgs, kept: Mapping[str, bytes | Path]) -> dict[str, bytes | Path]:
    """The two files for a model with vision: those that came with it where they say what it is, else new ones, of a
    model that reads tiles."""
    assert args.vision is not None
    vision, came = args.vision, {name: kept[name] for name in FILES if name in kept}
    if vision.kind == "native":
        return came
    size = {"height": vision.image_size, "width": vision.image_size}
    image = {
        "image_processor_type": "Llama4ImageProcessorFast",  # transformers 4 has no other; 5 reads it too
        "processor_class": "Llama4Processor",
        "size": size,
        "max_patches": vision.max_tiles,
        **TILES,
    }
    both = {
        "processor_class": "Llama4Processor",
        "patch_size": vision.patch_size,
        "pixel_shuffle_ratio": vision.pixel_shuffle_ratio,
        **TOKENS,
    }
    read = {name: json.loads(c.read_bytes() if isinstance(c, Path) else c) for name, c in came.items()}
    said = read.get(BOTH, {}).get("image_processor") or read.get(IMAGE, {})
    if said.get("max_patches") == vision.max_tiles and _same(said.get("size"), size):
        return came
    return {IMAGE: _json(image), BOTH: _json(both)}


def marks_of(tokenizer: Tokenizer) -> dict[str, int]:
    """Keys of a config for the tokens around an image, as far as a tokenizer has them."""
    keys = {"boi_token_index": NAMES["image_start"], "eoi_token_index": NAMES["image_end"]}
    return {key: tokenizer.control_tokens[name] for key, name in keys.items() if name in tokenizer.control_tokens}


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=2, sort_keys=True).encode() + b"\n"
