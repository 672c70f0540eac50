"""Rows come out of every form of file as they went in, or are refused by file and row."""

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

from llm.data.documents import read_documents
from llm.data.listing import list_input
from llm.data.tables import raw_rows
from llm.errors import UserError

ROWS: list[dict[str, Any]] = [
    {"text": text, "other": other}
    for text, other in [("one\r\ntwo", "x"), ("", ""), ('a "b", {c}', "y"), ("\u00e9", "z")]
]
PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pa.Codec("zstd").compress(content, asbytes=True),
}


def as_csv() -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, ["text", "other"])
    writer.writeheader()
    writer.writerows(ROWS)
    return out.getvalue().encode()


def as_arrow(stream: bool) -> bytes:
    table, sink = pa.Table.from_pylist(ROWS), pa.BufferOutputStream()
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return bytes(sink.getvalue())


def as_parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ROWS), sink)
    return bytes(sink.getvalue())


def as_feather() -> bytes:
    sink = pa.BufferOutputStream()
    feather.write_feather(pa.Table.from_pylist(ROWS), sink, compression="zstd")
    return bytes(sink.getvalue())


LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
FILES: dict[str, bytes] = {
    **{f"a.jsonl{ending}": pack(LINES) for ending, pack in PACK.items()},
    **{f"a.json{ending}": pack(json.dumps(ROWS, indent=1).encode()) for ending, pack in PACK.items()},
    **{f"a.csv{ending}": pack(as_csv()) for ending, pack in PACK.items()},
    "bom.csv": b"\xef\xbb\xbf" + as_csv(), "a.parquet": as_parquet(), "a.arrow": as_arrow(stream=False),
    "stream.arrow": as_arrow(stream=True), "a.feather": as_feather(),
}  # fmt: skip


def rows_of(path: Path) -> list[tuple[int, Any]]:
    (file,) = list_input(path).files
    return [(row.number, row.value) for row in raw_rows(file, f"input={path}")]


@pytest.mark.parametrize("name", FILES)
def test_every_form_holds_the_same_rows_numbered_from_1(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    assert rows_of(tmp_path / name) == list(enumerate(ROWS, 1))


@pytest.mark.parametrize("name", ["a.csv", "a.csv.zst", "a.arrow", "stream.arrow", "a.feather"])
def test_they_are_read_as_text_too(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    found = list(read_documents(tmp_path / name))
    assert [document.text for document in found] == [row["text"] for row in ROWS]
    assert [document.key for document in found] == [f"{name}:{i + 1}" for i in range(len(ROWS))]
    with pytest.raises(UserError, match=f"{name}: no column 'story'; it has 'text', 'other'"):
        list(read_documents(tmp_path / name, text_field="story"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,other\na,b\nc\n", r"row 2 \(line 3\): has 1 values where the first line names 2 columns"),
        ("text,text\na,b\n", "two columns are called 'text'"),
        ('text\n"a\n', r"after row 0 \(line 2\): not CSV"),
        ("text\na\n\nb\udcff\n", "not UTF-8"),
    ],
)
def test_a_broken_csv_is_named_by_its_row(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=rf"a\.csv.*{message}"):
        rows_of(tmp_path / "a.csv")


@pytest.mark.parametrize("name", ["a.arrow", "stream.arrow"])
def test_a_damaged_arrow_file_is_named(name: str, tmp_path: Path) -> None:
    whole = FILES[name]
    table = whole.index(b"one\r\ntwo")
    offsets = whole.rindex((8).to_bytes(4, "little"), 0, table)  # where the first text ends
    torn = whole[:offsets] + (1 << 30).to_bytes(4, "little") + whole[offsets + 4 :]
    for content in (torn, whole[: len(whole) // 2], b"ARROW1\0\0"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}, after row \d: damaged or unreadable Arrow file"):
            rows_of(tmp_path / name)


def test_what_datasets_keeps_beside_its_files_is_left_out(tmp_path: Path) -> None:
    for name in ("data-00000-of-00001.arrow", "cache-1b2c3d4e5f60718a.arrow"):
        (tmp_path / name).write_bytes(FILES["stream.arrow"])
    (tmp_path / "state.json").write_text("{}")
    assert len(list(read_documents(tmp_path))) == len(ROWS)
