"""What tools/inspect.py shows of a folder of samples, as data.cache_dir has them of rows that are no plain text: where
each came from, how long it is, and the tiles of its images as the model sees them.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from llm.data.sample import Sample
from llm.data.samples import ImagesEntry, SampleSource
from llm.data.source import MANIFEST, SHARDS
from llm.errors import UserError


def samples_in(path: Path) -> SampleSource:
    """The samples of a folder. UserError where it is none, or damaged."""
    if not (path / MANIFEST).is_file() or not (path / SHARDS).is_dir():
        raise UserError(
            f"{path}: --show is for a folder of samples, as data.cache_dir has them; what a run will read is shown by "
            f"lattice finetune --config C --show 3"
        )
    return SampleSource.open(path)


def sample_lines(source: SampleSource, n: int, folder: Path | None) -> Iterator[str]:
    """A line of each of the first n samples; their tiles are written into `folder`, as sample_1_tile_1.png and so on.
    """
    manifest = source.manifest
    images = manifest.images
    if folder is not None:
        if images is None:
            raise UserError(f"{source.path}: its samples have no images, which --images would write")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--images={folder}: {error.strerror}") from None
    tiles = "" if images is None else f", {images.tiles:,} tiles of {images.image_size} x {images.image_size}"
    yield f"{source.path}: {manifest.samples:,} samples of kind {manifest.made_as}, {manifest.tokens:,} tokens{tiles}"
    for number in range(min(n, source.n_samples)):
        sample = source.sample(number)
        yield f"sample {number + 1}: {source.origin(number)}; {_described(sample, images)}"
        if folder is not None and sample.images is not None:
            for place, tile in enumerate(sample.images, 1):
                Image.fromarray(tile.transpose(1, 2, 0)).save(folder / f"sample_{number + 1}_tile_{place}.png")


def _described(sample: Sample, images: ImagesEntry | None) -> str:
    parts = [f"{len(sample.tokens):,} tokens", f"{int(np.count_nonzero(sample.weights[1:])):,} targets"]
    if images is not None:
        n_tiles = 0 if sample.images is None else len(sample.images)
        slots = int(np.count_nonzero(sample.tokens == images.patch_token_id))
        parts += [f"{n_tiles:,} tile{'' if n_tiles == 1 else 's'}", f"{slots:,} slots"]
    return ", ".join(parts)
