"""What `transformers`' own processor makes of generated pictures: digests in tests/golden/tiles.json, for the tests.

`make vision-reference` runs this in a virtual environment of its own, with torchvision, which the project does without.
A file that is there is compared first, and what differs is listed.

Left out are pictures that become one pixel wide: there the resize of torch 2.13 writes wrong levels, which kernel ever
it uses. tests/vision/test_tiles.py compares these with Pillow.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from tests.vision.pictures import picture

FILE = Path(__file__).parents[1] / "golden" / "tiles.json"
CANVASES = [(r, c) for r in range(1, 17) for c in range(1, 16 // r + 1)]
EDGES = (1, 2, 3, 27, 28, 29, 55, 56, 57, 83, 84, 111, 112, 113, 168, 223, 224, 337, 448, 450)
LONG = ((1, 4000), (4000, 1), (2, 3000), (3000, 2), (7, 2900), (2900, 7), (1, 1), (13, 1), (1, 13))
RELEASED = ((336, 336), (335, 337), (480, 640), (1067, 800), (1, 700), (700, 1), (1344, 1344), (90, 2000))

Case = tuple[int, int, int, int]
"""(height, width) of a picture, (side, max_tiles) of the model."""


def cases() -> Iterator[Case]:
    """Pictures whose tiles are compared: exact fits and a pixel beside them, edges of every kind, strips, photographs'
    sizes with the released model's tiles."""
    for rows, columns in CANVASES:
        yield rows * 28, columns * 28, 28, 16
        yield rows * 28 + 1, columns * 28 - 1, 28, 16
    for at, height in enumerate(EDGES):
        for width in EDGES[at % 3 :: 3]:
            yield height, width, 28, (1, 2, 4, 9, 16)[(height + width) % 5]
    for height, width in LONG:
        yield height, width, 28, 16
        yield height, width, 12, 3
    for height, width in RELEASED:
        yield height, width, 336, 16


def sizes() -> Iterator[Case]:
    """Pictures of which only the grid and the size on it are compared: many ratios, as rounding depends on them."""
    for i in range(6000):
        yield 1 + i * i * 7 % 1913, 1 + i * i * i * 11 % 1571, (336, 28, 64)[i % 3], (16, 4, 12, 16)[i % 4]


def digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def name(case: Case) -> str:
    height, width, side, max_tiles = case
    return f"{height}x{width} in {max_tiles} of {side}"


def number(case: Case) -> int:
    """Which picture of its size a case shows."""
    return (case[0] * 3 + case[1]) % 19


def processor():  # type: ignore[no-untyped-def]
    """Llama4ImageProcessor as it comes, without what follows the tiles."""
    if torch.version.cuda is None:
        # torchvision from PyPI is built for CUDA: beside a CPU build of torch its library does not load, and it wants
        # to describe operators that this has, of which resizing uses none
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
    from torchvision.transforms.v2.functional import _geometry

    # on CPUs without vector units torchvision resizes floats instead, which is up to a level off
    _geometry._do_native_uint8_resize_on_cpu = lambda interpolation: True
    from transformers.models.llama4.image_processing_llama4 import Llama4ImageProcessor

    class Sizes(Llama4ImageProcessor):
        """Keeps the sizes that it resizes to."""

        def resize(self, image, size, resample=None, antialias=True, **kwargs):  # type: ignore[no-untyped-def]
            self.asked.append((size.height, size.width))
            if not self.draws:
                return image.new_zeros((*image.shape[:2], size.height, size.width))
            return super().resize(image, size, resample=resample, antialias=antialias, **kwargs)

    made = Sizes(do_rescale=False, do_normalize=False)
    made.asked, made.draws, made.library = [], True, library if torch.version.cuda is None else None
    return made


def tiles() -> dict[str, list]:
    """{name: [rows, columns, digest of the tiles]}."""
    found = {}
    real = processor()
    for case in cases():
        height, width, side, max_tiles = case
        real.asked.clear()
        settings = {"size": {"height": side, "width": side}, "max_patches": max_tiles}
        out = real([picture(height, width, number(case))], return_tensors="pt", **settings)
        pixels = out["pixel_values"].contiguous().numpy()
        assert pixels.dtype == np.uint8
        if real.asked[0][1] > 1:
            found[name(case)] = [*out["aspect_ratios"][0].tolist(), digest(pixels.tobytes())]
    return found


def layouts() -> str:
    """Digest of rows, columns, height and width on the canvas, of every case of `sizes`."""
    real = processor()
    real.draws = False
    found = []
    for height, width, side, max_tiles in sizes():
        real.asked.clear()
        picture = torch.zeros(3, height, width, dtype=torch.uint8)
        settings = {"size": {"height": side, "width": side}, "max_patches": max_tiles}
        out = real([picture], input_data_format="channels_first", return_tensors="pt", **settings)
        found.append([*out["aspect_ratios"][0].tolist(), *map(int, real.asked[0])])
    return digest(np.array(found, dtype=np.int32).tobytes())


def main() -> None:
    found = {"torch": torch.__version__.split("+")[0], "layouts": layouts(), "tiles": tiles()}
    if FILE.exists():
        kept = json.loads(FILE.read_text())
        apart = [key for key, row in found["tiles"].items() if kept["tiles"].get(key) != row]
        print(f"grids and sizes: {'as they were' if kept['layouts'] == found['layouts'] else 'others'}")
        print(f"tiles: {len(apart)} of {len(found['tiles'])} pictures have others", *apart, sep="\n  ")
    rows = ",\n".join(f"  {json.dumps(key)}: {json.dumps(row)}" for key, row in found.pop("tiles").items())
    FILE.write_text(json.dumps(found, indent=1)[:-2] + f',\n "tiles": {{\n{rows}\n }}\n}}\n')
    print(f"{FILE.name} written, on a CPU whose kernels are {torch.backends.cpu.get_cpu_capability()}")


if __name__ == "__main__":
    main()
