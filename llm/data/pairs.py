"""The kind `pair`: rows of a source text, which an encoder reads, and the target text that is to be made of it.

The source is what the tokenizer puts around a document; the target begins with the mark that begins a text, or where
the tokenizer has none with the one that ends it, and is trained up to the end mark.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from llm.data.json_rows import called
from llm.data.kinds import Asked, register
from llm.data.pair_rows import SEQ2SEQ, PairRows
from llm.data.sample import Sample
from llm.data.sample_kind import Content, SampleKind
from llm.data.samples import SampleManifest, SampleSource
from llm.data.sources import SourceFiles
from llm.data.tables import columns_of
from llm.errors import UserError
from llm.tokenizer import Tokenizer


class Pair(SampleKind):
    name = "pair"
    target = SEQ2SEQ
    samples_per_item = 2
    columns = ("source", "target")

    def encoder(self, files: SourceFiles, asked: Asked) -> "PairEncoder":
        if asked.source_len is None:
            raise UserError(f"{files.given}: rows of kind pair have a source, which a model without an encoder cannot "
                            f"read (model.encoder_layers)")  # fmt: skip
        return PairEncoder(files, asked.tokenizer)

    def rows(self, files: SourceFiles, asked: Asked, source: SampleSource) -> PairRows:
        assert asked.source_len is not None  # `encoder` was asked before
        return PairRows(
            source,
            asked.seq_len,
            asked.source_len,
            0 if asked.held_out else asked.seed,
            together=self.packing(asked) == "best_fit",
            max_length=asked.pair_max_length,
            given=files.given,
        )

    def trained_lines(self, given: str, manifest: SampleManifest) -> Iterator[str]:
        sources = manifest.tokens - manifest.trained - manifest.samples // 2
        yield f"{given}: {manifest.trained:,} tokens of targets are trained on, made of {sources:,} of sources"


class PairEncoder:
    """Makes samples of rows of two texts."""

    fingerprint: object = None

    def __init__(self, files: SourceFiles, tokenizer: Tokenizer) -> None:
        self.columns = {name: files.spec.single_columns.get(name, name) for name in Pair.columns}
        self.tokenizer = tokenizer

    def read(self, row: Mapping[str, Any]) -> Content:
        source, target = (self._text(row, name) for name in Pair.columns)

        def samples() -> tuple[Sample, ...]:
            tokenizer = self.tokenizer
            return (
                _sample(tokenizer.source_ids(source), trained=False),
                _sample([tokenizer.bos_id, *tokenizer.encode(target), tokenizer.eos_id], trained=True),
            )

        return Content(source.encode(), samples)  # a source is held out with all of its targets, or with none

    def _text(self, row: Mapping[str, Any], name: str) -> str:
        column = self.columns[name]
        if column not in row:
            raise UserError(f"has no column {column!r} for its {name} (see columns); it has {columns_of(row)}")
        text = row[column]
        if not isinstance(text, str):
            raise UserError(f"its {name}, {column}, is {called(text)}, not a text")
        if not text:
            raise UserError(f"its {name}, {column}, is empty")
        return text


def _sample(ids: list[int], trained: bool) -> Sample:
    weights = np.full(len(ids), trained, dtype=np.float32)
    weights[0] = 0
    return Sample(np.array(ids, dtype=np.int64), weights, np.array([len(ids)], dtype=np.int64))


register(Pair())
