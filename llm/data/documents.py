"""Reading documents from text files and files of rows (JSON, CSV, Parquet, Arrow), strictly: what cannot be read is an
error with file and line.

Text is taken as it is: no newline is translated and nothing is stripped. Nothing is skipped silently; an empty text is
a document too.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from llm.data.formats import file_type, opened, shown
from llm.data.found import Inventory
from llm.data.json_rows import called, kind_hint, text_of
from llm.data.listing import InputFile, Listing, list_input
from llm.data.tables import RawRow, columns_of, raw_rows, readable, refuse_other_content
from llm.errors import UserError

PART = "::"
"""Between the name of a text file that is cut at document marks and the number of a document in it."""


@dataclass(frozen=True)
class Document:
    """key: the file's name in its folder, with `:line` or `:row` (from 1) where a file holds several, `::number` where
    it is a text cut at marks; consumed: bytes of all input files read when it ended, `bytes` of them for itself;
    folder: the absolute path that `key` starts from, empty where there is none; where: what messages call it, `key` if
    nothing is said.
    """

    key: str
    text: str
    consumed: int
    folder: str = ""
    where: str = ""
    bytes: int = 0

    @property
    def called(self) -> str:
        """What messages call it."""
        return self.where or self.key


@dataclass(frozen=True)
class Reading:
    """How files are read. text_field: of rows; separator: ends a document in text files, which without
    one are a document each.
    """

    text_field: str = "text"
    separator: str | None = None


def split_key(key: str) -> tuple[str, int | None]:
    """(file, line, row or number from 1) of a document's key; None for a file that is one document."""
    file, mark, row = key.rpartition(":")
    if mark and row.isdecimal() and row.isascii():
        if file.endswith(":"):
            return file[:-1], int(row)
        type_of_file = file_type(file)
        if type_of_file is not None and type_of_file.has_rows:
            return file, int(row)
    return key, None


def option(key: str, name: str) -> str:
    """How the option `name` of the text that was given as `key` is typed."""
    return f"--{name}" if key.startswith("--") else f"--{key.removesuffix('.path')}.{name}"


def read_documents(
    *paths: str | Path, text_field: str = "text", key: str = "input", separator: str | None = None
) -> Iterator[Document]:
    """All documents of the paths. A text file is one document, or several that end with `separator`; files of
    rows have one in each row's `text_field`.

    UserError names `key`, file and row; a missing path is found before anything is read.
    """
    listings = [list_input(path, key) for path in paths]
    return read_listings(listings, Reading(text_field, separator))


def read_listings(
    listings: Iterable[Listing], reading: Reading, inventory: Inventory | None = None
) -> Iterator[Document]:
    """All documents of the files that were listed; `inventory` counts them."""
    before = 0
    for listing in listings:
        for file in listing.files:
            folder = os.fsencode(file.folder.absolute()).decode(errors="replace")
            name = os.fsencode(file.name).decode(errors="replace")
            where = f"{listing.key}={shown(file.path)}"
            if inventory is not None:
                inventory.begin_file(file)
            last = 0
            for row, text, consumed in _rows(file, where, reading, option(listing.key, "text_field"), inventory):
                document = Document(
                    key=f"{name}{PART if file.type.format == 'text' else ':'}{row}" if row else name,
                    text=text,
                    consumed=before + consumed,
                    folder=folder,
                    bytes=consumed - last,
                    where=f"{where}, {'document' if file.type.format == 'text' else 'row'} {row}" if row else where,
                )
                try:
                    text.encode()
                except UnicodeEncodeError:
                    raise UserError(
                        f"{document.called}: the text has a lone surrogate, which is no character"
                    ) from None
                last = consumed
                if inventory is not None:
                    inventory.add(not document.text)
                yield document
            before += file.status.st_size


def _rows(
    file: InputFile, where: str, reading: Reading, option: str, inventory: Inventory | None
) -> Iterator[tuple[int, str, int]]:
    """(row from 1, or 0 for a whole file; text; bytes of the file read so far)."""
    if file.type.has_rows:
        for row in raw_rows(file, where, [reading.text_field]):
            yield row.number, _text(row, where, reading.text_field, option), row.consumed
        return
    with readable(file, where):
        refuse_other_content(file, where)
        with opened(file.path, file.type.compression) as (stream, _):
            yield from _texts(file, stream, where, reading.separator, inventory)


def _text(row: RawRow, where: str, text_field: str, option: str) -> str:
    """The text of a row."""
    if not row.in_columns:
        return text_of(row.value, f"{where}, {row.place}", text_field, option)
    if text_field not in row.value:
        hint = kind_hint(row.value, option)
        raise UserError(f"{where}: no column {text_field!r}; it has {columns_of(row.value)} (see {option}){hint}")
    text = row.value[text_field]
    if not isinstance(text, str):
        raise UserError(f"{where}, {row.place}: its column {text_field!r} is {called(text)}, not a text; see {option}")
    return text


def _texts(
    file: InputFile, stream: IO[bytes], where: str, separator: str | None, inventory: Inventory | None
) -> Iterator[tuple[int, str, int]]:
    content = stream.read()
    zero = content.find(b"\0")
    if zero >= 0:
        raise UserError(f"{where}: is no text file (byte {zero} is zero); move it away, or convert it to UTF-8 text")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start}, so no text file as it is read here") from None
    del content
    size = file.status.st_size
    if separator is None:
        if inventory is not None:
            inventory.look(text)
        yield 0, text, size
        return
    if inventory is not None and text:
        inventory.cut_at(separator, text.count(separator))
    at, number = 0, 0
    while at < len(text):
        number += 1
        end = text.find(separator, at)
        if end < 0:
            yield number, text[at:], size
            return
        start, at = at, end + len(separator)
        if not separator[-1].isspace():  # the line end behind a mark is the mark's, not the next text's
            at += 2 if text.startswith("\r\n", at) else text.startswith("\n", at)
        yield number, text[start:end], size * at // len(text)
    if not text:
        yield 1, text, size
