"""Files as tables: raw rows, one after the other, of JSON, CSV, Parquet and Arrow files, read in pieces, so that a file
may be larger than memory. What is damaged is an error with file and row.
"""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from llm.data.formats import DAMAGED, MAGIC_ARROW, opened
from llm.data.json_rows import MAX_RECORD_BYTES, is_json_lines, json_file, json_lines
from llm.data.listing import InputFile
from llm.errors import UserError

POINTER = b"version https://git-lfs.github.com/spec/"
"""How a file begins that stands for one that Git LFS has not fetched."""
PACKED = {b"\x1f\x8b": "gz", b"BZh91AY&SY": "bz2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zst"}
"""How packed files begin, as no text does."""
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
BATCH_ROWS = 1024


@dataclass(frozen=True)
class RawRow:
    """One row as the file has it.

    number: its line (JSON Lines), record (JSON) or row from 1, the header of a CSV not counted; place: what messages
    call it, without the file; value: a mapping of columns, or what else stands where one should, in JSON; consumed:
    bytes of the file read when it ended; in_columns: whether all rows of the file have the same columns.
    """

    number: int
    place: str
    value: Any
    consumed: int
    in_columns: bool = True


def raw_rows(file: InputFile, where: str, columns: Sequence[str] | None = None) -> Iterator[RawRow]:
    """All rows of a file of rows; of files that lie in columns only these, where they are given and there. UserError
    naming the file as `where`, and the row.
    """
    with readable(file, where):
        refuse_other_content(file, where)
        match file.type.format:
            case "parquet":
                yield from _parquet(file, where, columns)
            case "arrow":
                yield from _arrow(file, where, columns)
            case "csv":
                with opened(file.path, file.type.compression) as (stream, raw):
                    yield from _csv(stream, raw, where)
            case "lines" | "json":
                yield from _json(file, where)
            case other:
                raise ValueError(f"{other} files have no rows")


@contextmanager
def readable(file: InputFile, where: str) -> Iterator[None]:
    """What a damaged or unreadable file raises inside, as a UserError."""
    try:
        yield
    except DAMAGED as error:
        raise UserError(f"{where}: damaged or cut-off {file.type.compression} file ({error})") from None
    except OSError as error:
        if error.strerror is None and file.type.compression:
            raise UserError(f"{where}: damaged or cut-off {file.type.compression} file ({error})") from None
        raise UserError(f"{where}: cannot be read ({error.strerror or error})") from None


def refuse_other_content(file: InputFile, where: str) -> None:
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


def _json(file: InputFile, where: str) -> Iterator[RawRow]:
    as_lines = file.type.format == "lines"
    if not as_lines:
        with opened(file.path, file.type.compression) as (stream, _):
            as_lines = is_json_lines(stream)
    with opened(file.path, file.type.compression) as (stream, raw):
        for number, place, value in (json_lines if as_lines else json_file)(stream, where):
            yield RawRow(number, place, value, raw.tell(), in_columns=False)


def _csv(stream: IO[bytes], raw: IO[bytes], where: str) -> Iterator[RawRow]:
    """Rows of a comma-separated file whose first row names the columns; a value may hold line ends between quotes."""
    csv.field_size_limit(MAX_RECORD_BYTES)
    text = io.TextIOWrapper(io.BufferedReader(stream), "utf-8-sig", newline="")  # type: ignore[type-var]
    reader, number = csv.reader(text, strict=True), 0
    try:
        names = next(reader, None)
        if names is None:
            return
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UserError(f"{where}: two columns are called {twice[0]!r}")
        for values in reader:
            if values:  # a blank line is no row
                number += 1
                if len(values) != len(names):
                    raise UserError(
                        f"{where}, row {number} (line {reader.line_num}): has {len(values)} values where the first "
                        f"line names {len(names)} columns"
                    )
                yield RawRow(number, f"row {number}", dict(zip(names, values, strict=True)), raw.tell())
    except UnicodeDecodeError as error:
        raise UserError(f"{where}, after row {number}: not UTF-8 ({error.reason})") from None
    except csv.Error as error:
        raise UserError(f"{where}, after row {number} (line {reader.line_num}): not CSV ({error})") from None
    finally:
        text.detach()


def _parquet(file: InputFile, where: str, columns: Sequence[str] | None) -> Iterator[RawRow]:
    row = 0
    try:
        with pq.ParquetFile(file.path, page_checksum_verification=True) as table:
            total, names = table.metadata.num_rows, table.schema_arrow.names
            wanted = None if columns is None or not set(columns) <= set(names) else list(columns)
            for batch in table.iter_batches(batch_size=BATCH_ROWS, columns=wanted):
                for value in batch.to_pylist():
                    row += 1
                    yield RawRow(row, f"row {row}", value, file.status.st_size * row // total)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}, after row {row}: damaged or unreadable Parquet file ({_first(error)})") from None


def _arrow(file: InputFile, where: str, columns: Sequence[str] | None) -> Iterator[RawRow]:
    """Rows of an Arrow IPC file (also called Feather) or stream."""
    row = 0
    try:
        with pa.memory_map(str(file.path), "r") as source:
            for batch, consumed in _batches(source, file.status.st_size):
                batch.validate(full=True)  # Arrow believes what it reads, and damaged offsets lead anywhere
                if columns is not None and set(columns) <= set(batch.schema.names):
                    batch = batch.select(list(columns))
                for first in range(0, batch.num_rows, BATCH_ROWS):
                    for value in batch.slice(first, BATCH_ROWS).to_pylist():
                        row += 1
                        yield RawRow(row, f"row {row}", value, consumed)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}, after row {row}: damaged or unreadable Arrow file ({_first(error)})") from None


def _batches(source: pa.MemoryMappedFile, size: int) -> Iterator[tuple[pa.RecordBatch, int]]:
    """(batch, bytes read with it) of a file or stream of `size` bytes."""
    is_file = source.read(len(MAGIC_ARROW)) == MAGIC_ARROW
    source.seek(0)
    if not is_file:
        for batch in pa.ipc.open_stream(source):
            yield batch, source.tell()
        return
    reader = pa.ipc.open_file(source)
    for number in range(reader.num_record_batches):
        yield reader.get_batch(number), size * (number + 1) // reader.num_record_batches


def _first(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def columns_of(row: Mapping[str, Any], most: int = 20) -> str:
    """The columns of a row, for messages."""
    return ", ".join(map(repr, list(row)[:most])) or "no columns"
