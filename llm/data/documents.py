"""Reading documents from text files, folders, JSONL (plain or gzip) and Parquet, strictly: what cannot be read is an
error with its file and line.

Text is taken as it is: no newline is translated and nothing is stripped. Nothing is skipped silently; an empty text is
a document too.
"""

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from llm.errors import UserError

MAX_RECORD_BYTES = 1 << 28  # one JSONL line; also what a gzip bomb can reach in memory
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz")
PARQUET_SUFFIX = ".parquet"
BINARY_SUFFIXES = (".gz", ".zst", ".bz2", ".xz", ".zip", ".tar", ".arrow", ".bin", ".npy", ".model", ".safetensors")


@dataclass(frozen=True)
class Document:
    """key: the file's name in its folder, with `:line` or `:row` (from 1) where a file holds several; consumed: bytes
    of all input files read when it ended; folder: the absolute path that `key` starts from, empty where there is none.
    """

    key: str
    text: str
    consumed: int
    folder: str = ""


def split_key(key: str) -> tuple[str, int | None]:
    """(file, line or row from 1) of a document's key; None for a file that is one document."""
    file, _, row = key.rpartition(":")
    if row.isdecimal() and file.endswith((*JSONL_SUFFIXES, PARQUET_SUFFIX)):
        return file, int(row)
    return key, None


def input_files(path: Path, key: str = "input") -> list[Path]:
    """The files behind a path: itself, or all files below a folder in the order of their relative paths, hidden ones
    left out.

    UserError naming `key` when there is nothing to read, and for files that are neither text, JSONL nor Parquet.
    """
    if path.is_dir():
        below = [
            file
            for file in path.rglob("*")
            if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
        ]
        files = sorted(below, key=lambda file: file.relative_to(path).as_posix())
    else:
        files = [path]
    if not path.exists():
        raise UserError(f"{key}={path}: no such file or directory")
    if not files:
        raise UserError(f"{key}={path}: the folder has no files")
    for file in files:
        if file.name.endswith(BINARY_SUFFIXES) and not file.name.endswith(JSONL_SUFFIXES):
            raise UserError(
                f"{key}={file}: cannot be read as text; possible are text files, .jsonl, .jsonl.gz and .parquet"
            )
    return files


def read_documents(*paths: str | Path, text_field: str = "text", key: str = "input") -> Iterator[Document]:
    """All documents of the paths. A text file is one document; JSONL and Parquet have one in each row's `text_field`.

    UserError names `key`, file and row; a missing path is found before anything is read.
    """
    places = [(Path(path), file) for path in paths for file in input_files(Path(path), key)]
    return _documents(places, text_field, key)


def _documents(places: list[tuple[Path, Path]], text_field: str, key: str) -> Iterator[Document]:
    before = 0
    for path, file in places:
        folder = file.parent if file == path else path
        name = file.relative_to(folder).as_posix()
        where_from = os.fsencode(folder.absolute()).decode(errors="replace")
        for row, text, consumed in _rows(file, text_field, key):
            try:
                text.encode()
            except UnicodeEncodeError:
                where = f"{key}={file}" + (f", row {row}" if row else "")
                raise UserError(f"{where}: the text has a lone surrogate, which is no character") from None
            yield Document(f"{name}:{row}" if row else name, text, before + consumed, where_from)
        before += file.stat().st_size


def _rows(file: Path, text_field: str, key: str) -> Iterator[tuple[int, str, int]]:
    """(row from 1, or 0 for a whole file; text; bytes of the file read so far)."""
    try:
        if file.name.endswith(JSONL_SUFFIXES):
            yield from _jsonl_rows(file, text_field, key)
        elif file.name.endswith(PARQUET_SUFFIX):
            yield from _parquet_rows(file, text_field, key)
        else:
            content = file.read_bytes()
            yield 0, _utf8(content, f"{key}={file}"), len(content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{key}={file}: damaged or cut-off gzip file ({error})") from None
    except OSError as error:
        raise UserError(f"{key}={file}: cannot be read ({error.strerror or error})") from None


def _jsonl_rows(file: Path, text_field: str, key: str) -> Iterator[tuple[int, str, int]]:
    with file.open("rb") as raw:
        lines = gzip.GzipFile(fileobj=raw) if file.name.endswith(".gz") else raw
        number = 0
        while line := lines.readline(MAX_RECORD_BYTES + 1):
            number += 1
            where = f"{key}={file}, line {number}"
            if len(line) > MAX_RECORD_BYTES:
                raise UserError(f"{where}: longer than {MAX_RECORD_BYTES} bytes; is it JSONL, one object a line?")
            if not line.strip():
                continue
            try:
                record = json.loads(_utf8(line, where))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}: not JSON ({error})") from None
            if not isinstance(record, dict):
                raise UserError(
                    f"{where}: a {type(record).__name__} where an object with a field {text_field!r} must be"
                )
            if not isinstance(record.get(text_field), str):
                raise UserError(
                    f"{where}: no text in field {text_field!r} (see text_field); "
                    f"the line has {', '.join(map(repr, record)) or 'no fields'}"
                )
            yield number, record[text_field], raw.tell()


def _parquet_rows(file: Path, text_field: str, key: str) -> Iterator[tuple[int, str, int]]:
    size = file.stat().st_size
    row = 0
    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as table:
            fields = table.schema_arrow.names
            if text_field not in fields:
                raise UserError(
                    f"{key}={file}: no column {text_field!r}; it has {', '.join(map(repr, fields))} (see text_field)"
                )
            for batch in table.iter_batches(batch_size=1024, columns=[text_field]):
                for value in batch.column(0):
                    row += 1
                    text = value.as_py()
                    if not isinstance(text, str):
                        raise UserError(f"{key}={file}, row {row}: no text in column {text_field!r}")
                    yield row, text, size * row // table.metadata.num_rows
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{key}={file}, after row {row}: damaged or unreadable Parquet file ({reason})") from None


def _utf8(content: bytes, where: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start}") from None
