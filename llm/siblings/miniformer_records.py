"""Records of JSON Lines files."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llm.data.json_rows import called, json_lines
from llm.errors import UserError

Record = Mapping[str, Any]


def records(path: str | Path) -> Iterator[tuple[str, Record]]:
    """(what messages call it, record) of each line that is not blank. UserError naming the file and line."""
    try:
        with open(path, "rb") as file:
            for _, line, record in json_lines(file, str(path)):
                yield f"{path}, {line}", checked(record, f"{path}, {line}")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None


def checked(record: Any, place: str) -> Record:
    """UserError where a record is no object."""
    if not isinstance(record, dict):
        raise UserError(f"{place}: is {called(record)}, where an object of columns must be")
    return record


def column_of(record: Record, column: str, place: str) -> Any:
    """The value of a column. UserError naming file, line and column where there is none."""
    if column not in record:
        names = ", ".join(map(repr, list(record)[:20])) or "none"
        raise UserError(f"{place}: has no column {column!r}; it has {names}")
    return record[column]


def text_in(record: Record, column: str, place: str) -> str:
    """The text of a column. UserError naming file, line and column where it is none."""
    text = column_of(record, column, place)
    if not isinstance(text, str):
        raise UserError(f"{place}: its {column} is {called(text)}, not a text")
    return text
