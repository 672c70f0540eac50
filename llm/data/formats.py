"""What a file is, decided by its ending alone (in any case): text, rows (JSON, CSV, Parquet, Arrow), or nothing that
is read.

A file that holds text in a form that is not read (a table, an archive, a document) is refused, because its user may
think it is trained on. What holds no text, or describes the data, is left out of a folder, and named.
"""

import bz2
import gzip
import io
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import pyarrow as pa

Format = Literal["text", "lines", "json", "csv", "parquet", "arrow"]

MAGIC_ARROW = b"ARROW1"
"""How an Arrow IPC file begins, and a stream does not."""
COMPRESSIONS = ("gz", "bz2", "xz", "zst")
FORMAT_OF: dict[str, Format] = {
    **dict.fromkeys(("jsonl", "ndjson", "jsonlines", "ldjson", "jl"), "lines"),
    "json": "json",
    "csv": "csv",
    **dict.fromkeys(("parquet", "parq", "pq"), "parquet"),
    **dict.fromkeys(("arrow", "feather", "ipc"), "arrow"),
}  # fmt: skip
POSSIBLE = (
    "text files (.txt, .md, source code), JSON Lines (.jsonl, .ndjson), .json (JSON Lines, one array of objects, or "
    "one object), .csv, .parquet and .arrow; text, JSON and CSV also with .gz, .bz2, .xz or .zst behind"
)

TABLES = "tsv xls xlsx ods orc avro db sqlite sqlite3 tfrecord mds lance"
ARCHIVES = "zip tar tgz tbz tbz2 txz tzst 7z rar lz4 lzma lzo br z warc wet"
DOCUMENTS = "pdf doc docx odt rtf epub mobi ppt pptx djvu ps ipynb json5 jsonc geojson"
REFUSED = frozenset(f"{TABLES} {ARCHIVES} {DOCUMENTS}".split())
"""Endings of what may hold text, but not in a form that is read."""

IMAGES = (
    "png jpg jpeg gif bmp tif tiff webp ico svg heic psd mp3 wav flac ogg m4a mp4 avi mkv mov webm ttf otf woff woff2"
)
BINARIES = (
    "bin npy npz pt pth ckpt pkl pickle model safetensors gguf onnx h5 hdf5 msgpack mmap so o a dll exe class pyc"
)
NO_TEXT = {**dict.fromkeys(IMAGES.split(), "image, sound or font"), **dict.fromkeys(BINARIES.split(), "binary")}
ABOUT_DATA = {**dict.fromkeys(("lock", "crc", "index", "idx", "md5", "sha256", "incomplete"), "about the data")}

MARKERS = re.compile(
    r"_(success|started|committed|metadata|common_metadata)(_.*)?|dataset_(infos?|dict)\.json|state\.json"
    r"|cache-[0-9a-f]+(_\d+_of_\d+)?\.arrow"
)
"""Files that Spark, datasets and their like write beside data (lower case)."""
MODEL_FILES = re.compile(
    r"((generation_|preprocessor_)?config|tokenizer(_config)?|special_tokens_map|added_tokens|params"
    r"|.*\.safetensors\.index)\.json"
)
CARDS = re.compile(r"(readme|licen[cs]e|copying|notice|citation|changelog|authors)([._-].*)?")
"""Files that describe data (lower case); left out where they lie beside files of rows, else text like any other."""


@dataclass(frozen=True)
class FileType:
    """How a file is read. compression: one of COMPRESSIONS, or empty; ending: what it is called, as `.jsonl.gz`."""

    format: Format
    compression: str
    ending: str

    @property
    def has_rows(self) -> bool:
        """Whether a document is a row of the file."""
        return self.format != "text"


def file_type(name: str) -> FileType | None:
    """How a file of that name is read; None where it is not."""
    parts = Path(name).name.lower().split(".")[1:]
    compression = parts.pop() if parts and parts[-1] in COMPRESSIONS else ""
    last = parts[-1] if parts else ""
    format = FORMAT_OF.get(last, "text")
    if last in REFUSED or last in NO_TEXT or (compression and format in ("parquet", "arrow")):
        return None
    ending = "".join(f".{part}" for part in (last, compression) if part)
    return FileType(format, compression, ending if len(ending) <= 20 and ending.isprintable() else ".(other)")


def why_left_out(name: str) -> str | None:
    """Why a file of a folder is left out, by its name; None where it belongs to the data, or has to be refused."""
    lower = name.lower()
    ending = lower.rpartition(".")[2] if "." in lower else ""
    if name.startswith("."):
        return "hidden"
    if MARKERS.fullmatch(lower) or ending in ABOUT_DATA:
        return "about the data"
    if MODEL_FILES.fullmatch(lower):
        return "of a model or tokenizer"
    return NO_TEXT.get(ending)


def is_card(name: str) -> bool:
    """Whether a file of that name describes the data that it lies beside."""
    return CARDS.fullmatch(name.lower()) is not None


@contextmanager
def opened(path: Path, compression: str) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """(the bytes, unpacked; the file itself, whose position says how far it was read).

    What is damaged raises one of DAMAGED while it is read.
    """
    with path.open("rb") as raw:
        if compression == "zst":
            yield io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd")), raw
        elif compression:
            yield UNPACKED[compression](raw), raw
        else:
            yield raw, raw


UNPACKED: dict[str, Callable[[IO[bytes]], IO[bytes]]] = {
    "gz": lambda raw: gzip.GzipFile(fileobj=raw),  # type: ignore[dict-item, return-value]
    "bz2": bz2.BZ2File,
    "xz": lzma.LZMAFile,
}
DAMAGED = (EOFError, zlib.error, lzma.LZMAError)
"""What unpacking raises, besides an OSError without a number of the system."""


def shown(path: str | Path) -> str:
    """A path for a message: what cannot be printed (line ends, bytes that are no UTF-8) is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in os.fspath(path))
