"""The kind `labelled`: rows of a text and what is to be predicted of it.

A sample is the text between the tokenizer's begin and end marks, as a document of the kind `text` is.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm.data.augment import Augmentation, augmentation_named
from llm.data.documents import option
from llm.data.found import count
from llm.data.json_rows import called
from llm.data.kinds import Asked, register
from llm.data.labelled_rows import LabelledRows
from llm.data.labels import LabelOptions, Labels, LabelsEntry, weight_of
from llm.data.sample import Sample
from llm.data.sample_kind import Content, SampleKind
from llm.data.samples import SampleManifest, SampleSource
from llm.data.sources import SourceFiles
from llm.data.tables import columns_of
from llm.errors import UserError
from llm.tokenizer import Tokenizer


class Labelled(SampleKind):
    name = "labelled"
    target = "prediction"
    columns = ("text", "label", "weight")
    several = ("label",)

    def check(self, files: SourceFiles) -> None:
        super().check(files)
        if files.spec.augment is not None:
            key = option(files.key, "augment")[2:]
            if files.key.startswith("data.valid"):
                raise UserError(f"{key}={files.spec.augment}: is for training; held-out texts are read as they are")
            augmentation_named(files.spec.augment, key).check()

    def encoder(self, files: SourceFiles, asked: Asked) -> "LabelEncoder":
        if asked.labels is None:
            raise UserError(f"{files.given}: rows of kind labelled have labels, and the model predicts none "
                            f"(model.n_prediction)")  # fmt: skip
        return LabelEncoder(files, asked.tokenizer, asked.labels)

    def rows(self, files: SourceFiles, asked: Asked, source: SampleSource) -> LabelledRows:
        assert asked.labels is not None  # `encoder` was asked before
        together = self.packing(asked) == "best_fit"
        augmentation = self._augmentation(files, asked)
        if augmentation is not None and together:
            raise UserError(
                f"{option(files.key, 'augment')[2:]}={augmentation.name}: texts of changing lengths cannot be packed; "
                f"set data.packing to none"
            )
        return LabelledRows(
            source,
            asked.seq_len,
            0 if asked.held_out else asked.seed,
            together=together,
            max_length=asked.labels.max_length,
            given=files.given,
            causal=asked.labels.causal,
            augmentation=augmentation,
            encode=lambda text: encoded(asked.tokenizer, text),
        )

    def trained_lines(self, given: str, manifest: SampleManifest) -> Iterator[str]:
        labels = manifest.labels
        assert labels is not None
        total = manifest.samples * len(labels.names)
        none = f"; {count(labels.unlabelled, 'row')} without any" if labels.unlabelled else ""
        of_each = ""
        if any(labels.missing) and len(labels.names) > 1:
            parts = [f"{name} {n:,}" for name, n in zip(labels.names, labels.missing, strict=True) if n]
            of_each = f" (missing: {', '.join(parts[:20])}{', ...' if len(parts) > 20 else ''})"
        yield f"{given}: {total - sum(labels.missing):,} of {count(total, 'label')} are there{of_each}{none}"

    def _augmentation(self, files: SourceFiles, asked: Asked) -> Augmentation | None:
        name = files.spec.augment
        return None if name is None or asked.held_out else augmentation_named(name, option(files.key, "augment")[2:])


class LabelEncoder:
    """Makes samples of rows of a text and labels."""

    def __init__(self, files: SourceFiles, tokenizer: Tokenizer, options: LabelOptions) -> None:
        spec = files.spec
        given = spec.columns.get("label", "label")
        self.columns = [given] if isinstance(given, str) else given
        self.labels = Labels(self.columns, options, option(files.key, "columns")[2:] + ".label")
        self.text, self.weight = spec.single_columns.get("text", "text"), spec.single_columns.get("weight")
        self.tokenizer, self.keeps_text = tokenizer, spec.augment is not None
        self.fingerprint: object = [options.kind, options.n, self.keeps_text]

    def labels_entry(self) -> LabelsEntry:
        """What is known of the labels so far."""
        return self.labels.entry(self.weight is not None, self.keeps_text)

    def read(self, row: Mapping[str, Any]) -> Content:
        if self.text not in row:
            raise UserError(f"has no column {self.text!r} for its text (see columns); it has {columns_of(row)}")
        text = row[self.text]
        if not isinstance(text, str):
            raise UserError(f"its {self.text} is {called(text)}, not a text")
        if not text:
            raise UserError(f"its {self.text} is empty")
        labels = self.labels.read(row)
        weight = 1.0 if self.weight is None else weight_of(row, self.weight)

        def samples() -> tuple[Sample, ...]:
            tokens = encoded(self.tokenizer, text)
            weights = np.zeros(len(tokens), dtype=np.float32)
            weights[0] = weight
            end = np.array([len(tokens)], dtype=np.int64)
            kept = text if self.keeps_text else None
            return (Sample(tokens, weights, end, labels=self.labels.numbers(labels), text=kept),)

        return Content(text.encode(), samples)  # as a document of the kind text: held out here, held out there


def encoded(tokenizer: Tokenizer, text: str) -> NDArray[np.int64]:
    """(n,) a text between its begin and end marks."""
    return np.array([*tokenizer.begin_ids, *tokenizer.encode(text), tokenizer.eos_id], dtype=np.int64)


register(Labelled())
