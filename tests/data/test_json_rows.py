"""Whatever stands under .json is read as the records it holds, in chunks, or refused by line."""

import bz2
import gzip
import io
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pytest

from llm.data import json_rows
from llm.data.documents import read_documents
from llm.errors import UserError

TEXTS = ["one\r\ntwo", "", "\u00e9 \U0001f600 \x00 ]},{", '["\\']
RECORDS = [{"id": i, "text": text, "more": [{"a": [1, 2]}, None]} for i, text in enumerate(TEXTS)]
FORMS = {
    "lines": "".join(json.dumps(record) + "\n" for record in RECORDS),
    "lines with blank ones": "\n" + "\r\n\r\n".join(json.dumps(record) for record in RECORDS),
    "array": json.dumps(RECORDS),
    "array over lines": json.dumps(RECORDS, indent=2, ensure_ascii=False) + "\n",
    "objects over lines": "\n".join(json.dumps(record, indent=1) for record in RECORDS),
    "with a byte order mark": "\ufeff" + json.dumps(RECORDS),
}
PACKED = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pa.Codec("zstd").compress(content, asbytes=True),
}


def texts_of(path: Path) -> list[str]:
    return [document.text for document in read_documents(path)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk_bytes", [1, 7, 1 << 20])
def test_records_come_out_as_they_went_in(
    form: str, chunk_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_rows, "CHUNK_BYTES", chunk_bytes)
    (tmp_path / "a.json").write_text(FORMS[form], newline="")
    assert texts_of(tmp_path / "a.json") == TEXTS


@pytest.mark.parametrize("ending", PACKED)
def test_packed_files_hold_what_was_packed(ending: str, tmp_path: Path) -> None:
    for name, content in (
        ("a.txt", "text\r\n"), ("a.jsonl", FORMS["lines"]), ("a.json", FORMS["array"])
    ):  # fmt: skip
        path = tmp_path / (name + ending)
        path.write_bytes(PACKED[ending](content.encode()))
        found = list(read_documents(path))
        assert [document.text for document in found] == ([content] if name == "a.txt" else TEXTS)
        assert found[-1].consumed == path.stat().st_size


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_a_damaged_packed_file_is_named(ending: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / (name + ending)
    whole = PACKED[ending](FORMS["lines"].encode() * 50)
    for content in (whole[:-9], b"no such file at all " * 9):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"input=.*{name}{ending}: damaged or cut-off {ending[1:]} file"):
            texts_of(path)


def test_one_object_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(RECORDS[0], indent=4))
    assert texts_of(tmp_path / "a.json") == TEXTS[:1]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('[\n{"text": "a"},\n{"text": 5}]', r"line 3 \(record 2\): its field 'text' is a number, not a text"),
        ('[\n{"text": "a"}\n{"text": "b"}]', "line 3: not JSON .*comma"),
        ('[\n{"text": "a"},', "line 2: not JSON"),
        ('[{"text": "a"}', "does not end"),
        ('[{"text": "a"}] []', "more behind the end"),
        ('{"version": 1,\n "data": [{"text": "a"}]}', "no text in field 'text'.*it has 'version', 'data'"),
        ('["a", "b"]', "a str where an object"),
        ("just text", "line 1: not JSON"),
        ('{"text": "a"}\n{oops\n', "line 2: not JSON"),
        ('{"body": "a"}\n', r"line 1: no text in field 'text' \(see --input.text_field\); it has 'body'"),
        ("[" * 100_000, "not JSON"),
        ('[{"text": "a', "not JSON"),
    ],
)
def test_json_that_is_no_list_of_texts_is_refused_by_line(content: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=rf"(?s)input=.*a\.json, {reason if 'line' in reason else '.*' + reason}"):
        texts_of(tmp_path / "a.json")


def test_an_array_in_json_lines_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(FORMS["array"])
    with pytest.raises(UserError, match=r"line 1: a list where an object .*an array belongs into a \.json file"):
        texts_of(tmp_path / "a.jsonl")


def test_bytes_that_are_no_utf8_are_named_by_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "CHUNK_BYTES", 5)
    (tmp_path / "a.json").write_bytes(b'[{"text": "caf\xe9"}]')
    with pytest.raises(UserError, match=r"a\.json: not UTF-8 at byte 14"):
        texts_of(tmp_path / "a.json")


def test_an_endless_record_is_refused_before_it_fills_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "MAX_RECORD_BYTES", 1000)
    monkeypatch.setattr(json_rows, "CHUNK_BYTES", 100)
    stream = io.BytesIO(b'[{"text": "' + b"x" * 1_000_000)
    with pytest.raises(UserError, match="a record longer than 1000 bytes"):
        list(json_rows.json_file(stream, "a"))
    assert stream.tell() < 5000


@pytest.mark.parametrize(("name", "rows", "kind"), [
    ("a.jsonl", '{"messages": []}\n', "chat"), ("a.csv", "prompt,completion\na,b\n", "completion"),
])  # fmt: skip
def test_rows_of_another_kind_are_refused_with_its_name_where_a_run_reads_them(
    name: str, rows: str, kind: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(rows)
    for key, hinted in (("data.train", True), ("input", False)):
        with pytest.raises(UserError, match="'text'") as refused:
            list(read_documents(tmp_path / name, key=key))
        assert str(refused.value).endswith(f"; rows with such columns want `kind: {kind}` beside their path") == hinted
