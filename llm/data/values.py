"""The kind `values`: rows of numbers, with what is to be predicted of them.

For task `regression` a row of a file is a sample: numbers at one position or several, and a label. For task
`autoregressive` a row is a series, whose next values are predicted; where its values are plain cells of a table, a row
is one step, and the file a series.

Shapes: n positions, F numbers of each (model.input_dim).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np

from llm.data.documents import option
from llm.data.found import count
from llm.data.kinds import Asked, register
from llm.data.labelled_rows import LabelledRows
from llm.data.labels import Labels, LabelsEntry, weight_of
from llm.data.listing import InputFile
from llm.data.numbers import Floats, values_of
from llm.data.sample import Sample
from llm.data.sample_kind import Content, SampleKind
from llm.data.samples import SampleManifest, SampleSource
from llm.data.series_rows import SeriesRows
from llm.data.sources import SourceFiles
from llm.data.tables import RawRow, columns_of, raw_rows
from llm.errors import UserError

ValueTask = Literal["regression", "autoregressive"]


@dataclass(frozen=True)
class ValueOptions:
    """What a run asks of values. width: F; stride: positions from one window of a series to the next, None for windows
    side by side.
    """

    task: ValueTask
    width: int
    stride: int | None = None


class Values(SampleKind):
    name = "values"
    columns = ("values", "label", "weight")
    several = ("values", "label")

    def encoder(self, files: SourceFiles, asked: Asked) -> "SampleEncoder | SeriesEncoder":
        options = asked.values
        if options is None:
            raise UserError(f"{files.given}: rows of kind values are numbers, and the model reads none "
                            f"(model.input_dim, model.output_dim)")  # fmt: skip
        if options.task == "regression":
            return SampleEncoder(files, asked, options)
        for name in ("label", "weight"):
            if name in files.spec.columns:
                raise UserError(f"{option(files.key, 'columns')[2:]}.{name}: is for task=regression; of a series the "
                                f"next values are predicted")  # fmt: skip
        return SeriesEncoder(files, options)

    def rows(self, files: SourceFiles, asked: Asked, source: SampleSource) -> LabelledRows | SeriesRows:
        assert asked.values is not None  # `encoder` was asked before
        together, seed = self.packing(asked) == "best_fit", 0 if asked.held_out else asked.seed
        if asked.values.task == "autoregressive":
            stride = None if asked.held_out else asked.values.stride
            return SeriesRows(source, asked.seq_len, seed, together=together, given=files.given, stride=stride)
        assert asked.labels is not None
        return LabelledRows(
            source, asked.seq_len, seed, together=together, max_length=asked.labels.max_length, given=files.given,
            causal=asked.labels.causal, max_length_key="regression.max_length",
        )  # fmt: skip

    def trained_lines(self, given: str, manifest: SampleManifest) -> Iterator[str]:
        if manifest.labels is None:
            yield f"{given}: {manifest.samples:,} series of {count(manifest.tokens, 'step')}"
            return
        total = manifest.samples * len(manifest.labels.names)
        missing = sum(manifest.labels.missing)
        yield f"{given}: {total - missing:,} of {count(total, 'label')} are there"


class SampleEncoder:
    """Makes samples of rows of numbers and labels."""

    def __init__(self, files: SourceFiles, asked: Asked, options: ValueOptions) -> None:
        assert asked.labels is not None
        spec = files.spec
        given = spec.columns.get("label", "label")
        self.values, self.width = spec.columns.get("values", "values"), options.width
        key = option(files.key, "columns")[2:] + ".label"
        self.labels = Labels([given] if isinstance(given, str) else given, asked.labels, key)
        self.weight = spec.single_columns.get("weight")
        self.fingerprint: object = ["regression", options.width, asked.labels.n]

    def labels_entry(self) -> LabelsEntry:
        """What is known of the labels so far."""
        return self.labels.entry(self.weight is not None, False)

    def read(self, row: Mapping[str, Any]) -> Content:
        features = _features(row, self.values, self.width)
        labels = self.labels.read(row)
        weight = 1.0 if self.weight is None else weight_of(row, self.weight)

        def samples() -> tuple[Sample, ...]:
            weights = np.zeros(len(features), dtype=np.float32)
            weights[0] = weight
            return (_sample(features, weights, self.labels.numbers(labels)),)

        return Content(features.tobytes(), samples)


class SeriesEncoder:
    """Makes samples of series."""

    def __init__(self, files: SourceFiles, options: ValueOptions) -> None:
        self.values, self.width = files.spec.columns.get("values", "values"), options.width
        self.fingerprint: object = ["autoregressive", options.width]

    def joined_rows(self, file: InputFile, where: str) -> Iterator[RawRow]:
        """The rows of a file; of one whose rows are steps, one row with all of them. UserError naming file and row."""
        rows = raw_rows(file, where)
        first = next(rows, None)
        if first is None:
            return
        if not isinstance(first.value, Mapping) or not self._is_step(first.value):
            yield from chain([first], rows)
            return
        steps: list[Floats] = []
        for row in chain([first], rows):
            try:
                step = _features(row.value, self.values, self.width)
                if len(step) != 1:
                    raise UserError(f"has {len(step)} steps, where the file's first row is one of a series")
            except UserError as error:
                raise UserError(f"{where}, {row.place}: {error}") from None
            steps.append(step)
            last = row
        yield RawRow(1, f"rows 1 to {last.number}", {"values": np.concatenate(steps)}, last.consumed)

    def read(self, row: Mapping[str, Any]) -> Content:
        features = _features(row, "values" if isinstance(row.get("values"), np.ndarray) else self.values, self.width)
        if len(features) < 2:
            raise UserError("has one step alone, and a series is to say what its next one is")
        return Content(features.tobytes(), lambda: (_sample(features, np.ones(len(features), dtype=np.float32)),))

    def _is_step(self, row: Mapping[str, Any]) -> bool:
        return not isinstance(self.values, str) or not isinstance(row.get(self.values, []), list | tuple)


def _features(row: Any, columns: str | list[str], width: int) -> Floats:
    if not isinstance(row, Mapping):
        raise UserError("is no object with columns")
    for column in [columns] if isinstance(columns, str) else columns:
        if column not in row:
            raise UserError(f"has no column {column!r} for its values (see columns); it has {columns_of(row)}")
    if isinstance(columns, str):
        return values_of(row[columns], columns, width)
    name = columns[0] if len(columns) == 1 else f"columns {columns[0]} to {columns[-1]}"
    return values_of([row[column] for column in columns], name, width, columns)


def _sample(features: Floats, weights: Floats, labels: Floats | None = None) -> Sample:
    n = len(features)
    tokens, end = np.zeros(n, dtype=np.int64), np.array([n], dtype=np.int64)
    return Sample(tokens, weights, end, labels=labels, features=features)


register(Values())
