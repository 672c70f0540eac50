"""Labels as raw rows have them: read, checked, and what is known of all of them.

A label is missing where its cell is empty, null or NaN. Of a classification a label is kept as the place of its class
among those that the source has, in the order in which they first came up; which place a class has in the model is
decided by all training rows together (llm/data/learned.py).

Shapes: L labels of a sample: 1 for a classification, else the model's predictions.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from llm.data.json_rows import called
from llm.data.tables import columns_of
from llm.errors import UserError

Prediction = Literal["classification", "regression", "multilabel"]
MaxLength = Literal["error", "drop", "cut"]
MOST_SHOWN = 40
"""Characters of a label in a message."""


@dataclass(frozen=True)
class LabelOptions:
    """What a run asks of labels. n: the model's predictions; causal: whether a text is read from left to right."""

    kind: Prediction
    n: int
    max_length: MaxLength = "error"
    causal: bool = False
    key: str = "model.n_prediction"
    """Of the config, that says n."""

    @property
    def labels(self) -> int:
        """L"""
        return 1 if self.kind == "classification" else self.n


class LabelsEntry(BaseModel):
    """What the manifest says of labels."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Prediction
    names: tuple[str, ...]
    """(L,): of the columns; of one column of lists, its name and their places from 0."""
    classes: tuple[str, ...] = ()
    """Of a classification: the classes that there are, in the order in which they came up."""
    missing: tuple[int, ...]
    """(L,): how many samples lack each."""
    unlabelled: int
    """How many samples lack all."""
    weighted: bool = False
    """Whether samples have weights."""
    with_text: bool = False
    """Whether their texts are kept too."""


class Labels:
    """Reads the labels of rows, and counts."""

    def __init__(self, columns: Sequence[str], options: LabelOptions, key: str) -> None:
        """key: of the config, under which the columns stand. UserError naming it where there are too many or few."""
        self.columns, self.options = tuple(columns), options
        n, kind = options.labels, options.kind
        if len(self.columns) != len(set(self.columns)):
            raise UserError(f"{key}={list(columns)}: names a column twice")
        if len(self.columns) not in (1, n):
            why = "a classification has one label" if kind == "classification" else f"{options.key}={options.n}"
            raise UserError(f"{key}={list(columns)}: names {len(self.columns)} columns, and {why}")
        self.in_a_list = len(self.columns) < n
        self.names = tuple(f"{self.columns[0]}.{i}" for i in range(n)) if self.in_a_list else self.columns
        self._classes: dict[str, int] = {}
        self._missing = np.zeros(n, dtype=np.int64)
        self._unlabelled = 0

    def read(self, row: Mapping[str, Any]) -> tuple[float | str | None, ...]:
        """(L,) the labels of a row: classes as text, None where one is missing. UserError saying what is wrong."""
        for column in self.columns:
            if column not in row:
                raise UserError(f"has no column {column!r} for its label (see columns); it has {columns_of(row)}")
        values: Sequence[Any] = [row[column] for column in self.columns]
        if self.in_a_list:
            (values,) = values
            if is_missing(values):
                values = [None] * self.options.n
            if isinstance(values, str) or not isinstance(values, Sequence):
                raise UserError(f"its column {self.columns[0]!r} is {shown_value(values)}, where a list of "
                                f"{self.options.n} labels must be ({self.options.key})")  # fmt: skip
            if len(values) != self.options.n:
                raise UserError(f"its column {self.columns[0]!r} has {len(values)} labels, and "
                                f"{self.options.key}={self.options.n}")  # fmt: skip
        named = zip(self.names, values, strict=True)
        return tuple(read_label(self.options.kind, f"its label {name!r}", value) for name, value in named)

    def numbers(self, labels: Sequence[float | str | None]) -> NDArray[np.float32]:
        """(L,) what is stored of them, NaN where one is missing; and counts them."""
        found = [self._number(label) for label in labels]
        numbers = np.array(found, dtype=np.float32)
        self._missing += np.isnan(numbers)
        self._unlabelled += bool(np.isnan(numbers).all())
        return numbers

    def entry(self, weighted: bool, with_text: bool) -> LabelsEntry:
        """What is known of all labels so far."""
        return LabelsEntry(
            kind=self.options.kind,
            names=self.names,
            classes=tuple(self._classes),
            missing=tuple(self._missing.tolist()),
            unlabelled=self._unlabelled,
            weighted=weighted,
            with_text=with_text,
        )

    def _number(self, label: float | str | None) -> float:
        if label is None:
            return math.nan
        return float(self._classes.setdefault(label, len(self._classes))) if isinstance(label, str) else label


def read_label(kind: Prediction, called: str, value: Any) -> float | str | None:
    """A label: of a classification the class as text; None where it is missing. UserError where it is no such label."""
    if is_missing(value):
        return None
    try:
        return READ[kind](value)
    except ValueError as error:
        raise UserError(f"{called} is {shown_value(value)}, {error}") from None


def is_missing(value: Any) -> bool:
    """Whether a cell has no label."""
    if isinstance(value, str):
        return value.strip() == "" or value.strip().lower() == "nan"
    return value is None or (isinstance(value, float) and math.isnan(value))


def weight_of(row: Mapping[str, Any], column: str) -> float:
    """The weight of a row. UserError saying what is wrong with it."""
    if column not in row:
        raise UserError(f"has no column {column!r} for its weight (see columns); it has {columns_of(row)}")
    value = row[column]
    try:
        weight = math.nan if is_missing(value) else finite(value)
    except ValueError:
        weight = math.nan
    if not 0 <= weight < 1 << 20:
        raise UserError(f"its weight {column!r} is {shown_value(value)}, where a number from 0 to {1 << 20:,} must be")
    return weight


def _class(value: Any) -> str:
    """The name of a class: a text as it is; an integer, which a table may hold as 1.0, as its digits."""
    if isinstance(value, str):
        return integer if (integer := _integer_text(value)) is not None else value.strip()
    if isinstance(value, int | float) and float(value).is_integer():
        return str(int(value))
    raise ValueError("where a class must be: a text or an integer")


def _integer_text(value: str) -> str | None:
    """A text that is an integer (1, -1, 1.0) in digits; None for other texts."""
    try:
        number = float(value) if value.strip().lstrip("+-").replace(".", "", 1).isdecimal() else math.nan
    except ValueError:
        return None
    return str(int(number)) if number.is_integer() else None


def finite(value: Any) -> float:
    """A number, or a text of one."""
    wrong = "where a number must be"
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(wrong)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    except ValueError:
        raise ValueError(wrong) from None
    if not abs(number) <= float(np.finfo(np.float32).max):
        raise ValueError("which is out of the range of numbers (float32)")
    return number


def _bit(value: Any) -> float:
    """0 or 1; true and false count as such."""
    if isinstance(value, bool) or str(value).strip().lower() in ("true", "false"):
        return float(str(value).strip().lower() == "true")
    if (number := finite(value)) not in (0, 1):
        raise ValueError("where 0 or 1 must be")
    return number


READ: dict[Prediction, Callable[[Any], float | str]] = {
    "classification": _class, "regression": finite, "multilabel": _bit,
}  # fmt: skip


def shown_value(value: Any) -> str:
    """A value in a message."""
    if isinstance(value, str | int | float):
        text = repr(value)
        return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."
    return called(value)
