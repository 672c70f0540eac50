"""Reading documents from text files, JSON and Parquet, strictly: what cannot be read is an error with file and line.

Text is taken as it is: no newline is translated and nothing is stripped. Nothing is skipped silently; an empty text is
a document too.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from llm.data.formats import DAMAGED, file_type, opened, shown
from llm.data.found import Inventory
from llm.data.json_rows import called, is_json_lines, json_file, json_lines
from llm.data.listing import InputFile, Listing, list_input
from llm.errors import UserError

POINTER = b"version https://git-lfs.github.com/spec/"
"""How a file begins that stands for one that Git LFS has not fetched."""
PACKED = {b"\x1f\x8b": "gz", b"BZh91AY&SY": "bz2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zst"}
"""How packed files begin, as no text does."""
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
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
    """How files are read. text_field: of JSON and Parquet rows; separator: ends a document in text files, which without
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
    """All documents of the paths. A text file is one document, or several that end with `separator`; JSON and Parquet
    have one in each row's `text_field`.

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
                    inventory.add(document.text)
                yield document
            before += file.status.st_size


def _rows(
    file: InputFile, where: str, reading: Reading, option: str, inventory: Inventory | None
) -> Iterator[tuple[int, str, int]]:
    """(row from 1, or 0 for a whole file; text; bytes of the file read so far)."""
    try:
        _refuse_other_content(file, where)
        if file.type.format == "parquet":
            yield from _parquet_rows(file, where, reading.text_field, option)
            return
        as_lines = file.type.format == "lines"
        if file.type.format == "json":
            with opened(file.path, file.type.compression) as (stream, _):
                as_lines = is_json_lines(stream)
        with opened(file.path, file.type.compression) as (stream, raw):
            if file.type.format == "text":
                yield from _texts(file, stream, where, reading.separator, inventory)
            else:
                for row, text in (json_lines if as_lines else json_file)(stream, where, reading.text_field, option):
                    yield row, text, raw.tell()
    except DAMAGED as error:
        raise UserError(f"{where}: damaged or cut-off {file.type.compression} file ({error})") from None
    except OSError as error:
        if error.strerror is None and file.type.compression:
            raise UserError(f"{where}: damaged or cut-off {file.type.compression} file ({error})") from None
        raise UserError(f"{where}: cannot be read ({error.strerror or error})") from None


def _refuse_other_content(file: InputFile, where: str) -> None:
    """UserError where the first bytes are of something else than the file's name says."""
    with file.path.open("rb") as stream:
        head = stream.read(len(POINTER))
    if head == POINTER:
        raise UserError(f"{where}: is a pointer of Git LFS, not the file itself; fetch it with `git lfs pull`")
    for magic, ending in PACKED.items():
        if head.startswith(magic) and not file.type.compression:
            raise UserError(f"{where}: is packed; give its name the ending .{ending}, by which it is unpacked")
    if head.startswith(UTF_16):
        raise UserError(f"{where}: is text in UTF-16; convert it, for example with `iconv -f utf-16 -t utf-8`")


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


def _parquet_rows(file: InputFile, where: str, text_field: str, option: str) -> Iterator[tuple[int, str, int]]:
    row = 0
    try:
        with pq.ParquetFile(file.path, page_checksum_verification=True) as table:
            fields = table.schema_arrow.names
            if text_field not in fields:
                raise UserError(
                    f"{where}: no column {text_field!r}; it has {', '.join(map(repr, fields))} (see {option})"
                )
            for batch in table.iter_batches(batch_size=1024, columns=[text_field]):
                for value in batch.column(0):
                    row += 1
                    text = value.as_py()
                    if not isinstance(text, str):
                        raise UserError(
                            f"{where}, row {row}: its column {text_field!r} is {called(text)}, not a text; see {option}"
                        )
                    yield row, text, file.status.st_size * row // table.metadata.num_rows
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{where}, after row {row}: damaged or unreadable Parquet file ({reason})") from None
