"""The kind `image_text`: rows of an image and the text that belongs to it, as captions are.

A sample is the begin mark, the image, the text and the end mark; text and end mark train.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llm.data.image_source import source_of
from llm.data.images import CutImage, ImageReader, digests
from llm.data.json_rows import called
from llm.data.kinds import Asked, register
from llm.data.sample import Sample
from llm.data.sample_kind import Content, SampleKind
from llm.data.sources import SourceFiles
from llm.data.tables import columns_of
from llm.errors import UserError
from llm.tokenizer import Tokenizer


class ImageText(SampleKind):
    name = "image_text"
    columns = ("image", "text")

    def encoder(self, files: SourceFiles, asked: Asked) -> "CaptionEncoder":
        if asked.vision is None:
            raise UserError(f"{files.given}: rows of kind image_text have images, which a model without vision cannot "
                            f"read (model.vision)")  # fmt: skip
        return CaptionEncoder(ImageReader(asked.vision, asked.tokenizer, asked.images), files.spec.single_columns)


class CaptionEncoder:
    """Reads rows of an image and a text."""

    def __init__(self, images: ImageReader, columns: Mapping[str, str]) -> None:
        self.images, self.columns = images, columns
        self.fingerprint: object = images.fingerprint

    def beside(self, folder: Path) -> "CaptionEncoder":
        """The same for rows of a file in this folder."""
        return CaptionEncoder(self.images.beside(folder), self.columns)

    def read(self, row: Mapping[str, Any]) -> Content:
        image, text = self._value(row, "image"), self._value(row, "text")
        if not isinstance(text, str):
            raise UserError(f"its {self.columns.get('text', 'text')} is {called(text)}, not a text")
        sources = [source_of(image, f"its {self.columns.get('image', 'image')}")]
        contents = self.images.contents(sources)
        known_by = "\n".join([*digests(contents), text]).encode()

        def samples() -> tuple[Sample, ...]:
            return (caption_sample(self.images.tokenizer, self.images.cut(contents, sources)[0], text),)

        return Content(known_by, samples)

    def _value(self, row: Mapping[str, Any], field: str) -> Any:
        column = self.columns.get(field, field)
        if row.get(column) is None:
            raise UserError(f"has no {field} in its column {column!r} (see columns); its columns are {columns_of(row)}")
        return row[column]


def caption_sample(tokenizer: Tokenizer, image: CutImage, text: str) -> Sample:
    """The sample of an image and its text."""
    said = tokenizer.encode_inside(text)
    before = [*tokenizer.begin_ids, *image.ids]
    tokens = np.array([*before, *said, tokenizer.eos_id], dtype=np.int64)
    weights = (np.arange(len(tokens)) >= len(before)).astype(np.float32)
    return Sample(tokens, weights, np.array([len(tokens)], dtype=np.int64), image.tiles)


register(ImageText())
