"""Rows of a task's files: of JSON Lines, JSON, CSV, Parquet and Arrow each a row, of a text file one with `text`."""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from llm.data.formats import opened
from llm.data.json_rows import called
from llm.data.listing import InputFile, list_input
from llm.data.tables import raw_rows, readable, refuse_other_content
from llm.errors import UserError


@dataclass(frozen=True)
class EvalRow:
    """A row."""

    number: int
    """among all rows of the task, from 1"""
    place: str
    """file and row in it, for messages"""
    file: str
    """name of its file, without ending"""
    columns: dict[str, Any]


class Rows:
    """The rows behind paths, in their order."""

    def __init__(self, paths: Sequence[Path], key: str, split: str | None = None) -> None:
        """split: regular expression at which text files are cut. UserError naming `key` where there is nothing to read.
        """
        self.files: list[InputFile] = [file for path in paths for file in list_input(path, key).files]
        try:
            self._split = None if split is None else re.compile(split)
        except (re.error, RecursionError, OverflowError) as error:
            raise UserError(f"data.split: not a regular expression ({error})") from None
        if split is not None and (with_rows := [file for file in self.files if file.type.has_rows]):
            raise UserError(f"data.split: {with_rows[0].path} has rows; only text files are cut")

    def digest(self) -> str:
        """Of the files' contents."""
        whole = hashlib.blake2b(digest_size=16)
        for file in self.files:
            with readable(file, str(file.path)), file.path.open("rb") as stream:
                whole.update(hashlib.file_digest(stream, "sha256").digest())
        return whole.hexdigest()

    def read(self, limit: int | None = None) -> tuple[list[EvalRow], bool]:
        """The rows, the first `limit` of them, and whether there are more. UserError naming file and row of what is
        damaged, or no row."""
        rows = self._all()
        found = list(islice(rows, limit))
        return found, limit is not None and next(rows, None) is not None

    def _all(self) -> Iterator[EvalRow]:
        number = 0
        for file in self.files:
            for place, value in _values(file, self._split):
                number += 1
                where = f"{file.path} row {place}"
                if not isinstance(value, dict):
                    raise UserError(f"{where}: {called(value)} where an object with columns must be")
                _refuse_halves(value, where)
                yield EvalRow(number, where, file.path.name.partition(".")[0], value)


def _values(file: InputFile, split: re.Pattern[str] | None) -> Iterator[tuple[int, Any]]:
    if file.type.has_rows:
        for raw in raw_rows(file, str(file.path)):
            yield raw.number, raw.value
        return
    with readable(file, str(file.path)):
        refuse_other_content(file, str(file.path))
        with opened(file.path, file.type.compression) as (stream, _):
            content = stream.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file.path} row 1: not UTF-8 (line {line})") from None
    for number, part in enumerate([text] if split is None else _parts(text, split), 1):
        yield number, {"text": part}


def _parts(text: str, split: re.Pattern[str]) -> list[str]:
    """A text cut where a pattern matches; blanks alone are no part, and stand before the next one, or after the last.
    """
    places = [0, *(place for match in split.finditer(text) for place in match.span()), len(text)]
    parts, blanks = [], ""
    for begin, end in zip(places[::2], places[1::2], strict=True):
        part = blanks + text[begin:end]
        blanks = "" if part.strip() else part
        if not blanks:
            parts.append(part)
    if blanks and parts:
        parts[-1] += blanks
    return [part for part in parts if part]


def _refuse_halves(value: Any, where: str) -> None:
    try:
        json.dumps(as_json(value), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise UserError(f"{where}: holds half a character ({half!r}), which UTF-8 has not") from None


def as_json(value: Any) -> Any:
    """A value of a row as JSON has it: bytes as their number, numbers that are none as null, what else a table may hold
    (dates) as text."""
    if isinstance(value, dict):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, bytes):
        return f"<{len(value):,} bytes>"
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)
