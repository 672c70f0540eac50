"""Reading text: exact, in a fixed order, and every fault with its file and line."""

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm.data import json_rows
from llm.data.documents import read_documents, split_key
from llm.errors import UserError

TEXTS = ["one\r\ntwo\r\n", "", "  tabs\tand\n\n\nblank lines \n", "\u00e9\u0301 \U0001f600 \u2028 \x00 \x85 end"]


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()


def texts_of(path: Path, text_field: str = "text") -> list[str]:
    return [document.text for document in read_documents(path, text_field=text_field)]


def write_parquet(path: Path, values: list, column: str = "text", **options: object) -> None:
    pq.write_table(pa.table({column: values, "other": list(range(len(values)))}), path, **options)


def test_a_text_file_is_one_document_byte_for_byte(tmp_path: Path) -> None:
    for number, text in enumerate([*TEXTS[:3], TEXTS[3].replace("\x00", "")]):
        path = tmp_path / f"{number}.txt"
        path.write_bytes(text.encode())
        assert texts_of(path) == [text]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_rows_come_out_as_they_went_in(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith(".parquet"):
        write_parquet(path, TEXTS)
    else:
        path.write_bytes(gzip.compress(jsonl(TEXTS)) if name.endswith(".gz") else jsonl(TEXTS))
    found = list(read_documents(path))
    assert [document.text for document in found] == TEXTS
    assert [document.key for document in found] == [f"{name}:{row}" for row in range(1, len(TEXTS) + 1)]
    assert found[-1].consumed == path.stat().st_size


def test_a_folder_is_read_in_the_order_of_paths_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/b/c.txt", ".hidden/x.txt", "a/.swp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "c.jsonl").write_bytes(jsonl(["row"]))
    assert [document.key for document in read_documents(tmp_path)] == ["a/b/c.txt", "a/z.txt", "b.txt", "c.jsonl:1"]


def test_several_paths_follow_one_another_and_count_their_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b.jsonl").write_bytes(jsonl(["second", "third"]))
    found = list(read_documents(tmp_path / "a.txt", tmp_path / "b.jsonl"))
    assert [document.text for document in found] == ["first", "second", "third"]
    consumed = [document.consumed for document in found]
    assert consumed == sorted(consumed)
    assert consumed[-1] == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_a_missing_path_is_found_before_others_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first")
    with pytest.raises(UserError, match="nowhere"):
        read_documents(tmp_path / "a.txt", tmp_path / "nowhere")


def test_the_text_field_can_be_chosen(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"story": "x"}\n\n{"story": "y"}\n')
    write_parquet(tmp_path / "a.parquet", ["z"], column="story")
    assert texts_of(tmp_path / "a.jsonl", "story") == ["x", "y"]
    assert texts_of(tmp_path / "a.parquet", "story") == ["z"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{not json}", "not JSON"),
        (b'"text"', "a str where an object"),
        (b'{"story": "x"}', "no text in field 'text'.*'story'"),
        (b'{"text": 5}', "its field 'text' is a number, not a text"),
        (b'{"text": null}', "field 'text' is null, not a text .see --input.text_field"),
        (b'{"text": "caf\xe9"}', "not UTF-8"),
        (b'{"text": "\\ud800"}', "lone surrogate"),
        (b"[" * 100_000, "not JSON"),
        (b'{"text": "cut', "not JSON"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(["fine", "fine too"]) + line + b"\n" + jsonl(["after"]))
    with pytest.raises(UserError, match=rf"(?s)a\.jsonl, (line|row) 3: .*{reason}"):
        texts_of(path)


def test_an_endless_line_is_refused_before_it_fills_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "MAX_RECORD_BYTES", 1000)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "' + b"x" * 1_000_000))
    with pytest.raises(UserError, match="line 1: longer than 1000 bytes"):
        texts_of(path)


def test_a_cut_off_gzip_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl(TEXTS * 100))[:-20])
    with pytest.raises(UserError, match=r"a\.jsonl\.gz: damaged or cut-off"):
        texts_of(path)


def test_a_text_file_in_another_encoding_is_named_with_the_place(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"a\.txt: not UTF-8 at byte 3"):
        texts_of(tmp_path / "a.txt")


@pytest.mark.parametrize("name", ["a.zip", "a.TAR.gz", "a.tsv", "a.parquet.gz"])
def test_a_form_that_is_not_read_is_refused_by_its_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"data")
    with pytest.raises(UserError, match=f"{name}: cannot be read as text"):
        texts_of(tmp_path)


def test_a_missing_path_and_an_empty_folder_are_named_with_their_key(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.train=.*nowhere: no such file"):
        list(read_documents(tmp_path / "nowhere", key="data.train"))
    with pytest.raises(UserError, match="has no files"):
        list(read_documents(tmp_path))


def test_a_parquet_file_without_the_column_names_those_it_has(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["x"], column="story")
    with pytest.raises(UserError, match="no column 'text'; it has 'story', 'other'"):
        texts_of(tmp_path / "a.parquet")


def test_an_empty_cell_in_parquet_is_named_by_its_row(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["x", None])
    with pytest.raises(UserError, match=r"a\.parquet, row 2"):
        texts_of(tmp_path / "a.parquet")


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = [f"some text {i}" for i in range(5000)]
    write_parquet(path, texts, use_dictionary=False, compression="none", write_page_checksum=True)
    content = bytearray(path.read_bytes())
    content[len(content) // 4] ^= 1
    for damaged in (bytes(content), bytes(content[:-10]), b"PAR1"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"a\.parquet.*damaged"):
            texts_of(path)


@pytest.mark.parametrize(
    ("content", "separator", "expected"),
    [
        ("a<|e|>b<|e|>c", "<|e|>", ["a", "b", "c"]),
        ("a<|e|>b<|e|>", "<|e|>", ["a", "b"]),
        ("a\n<|e|>\nb\r\n<|e|>\r\n\nc\n", "<|e|>", ["a\n", "b\r\n", "\nc\n"]),
        ("<|e|><|e|> a ", "<|e|>", ["", "", " a "]),
        ("a\n\nb\n\n\nc", "\n\n", ["a", "b", "\nc"]),
        ("no mark", "<|e|>", ["no mark"]),
        ("", "<|e|>", [""]),
    ],
)
def test_a_mark_ends_a_document_and_is_no_part_of_it(
    tmp_path: Path, content: str, separator: str, expected: list[str]
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content.encode())
    found = list(read_documents(path, separator=separator))
    assert [document.text for document in found] == expected
    assert [split_key(document.key) for document in found] == [("a.txt", i + 1) for i in range(len(expected))]
    assert found[-1].consumed == path.stat().st_size


def test_a_binary_text_file_is_refused_by_name(tmp_path: Path) -> None:
    for content in ("text".encode("utf-16-le"), b"\x7fELF\x00\x01", b"a\x00"):
        (tmp_path / "a.txt").write_bytes(content)
        with pytest.raises(UserError, match=r"input=.*a\.txt: is no text file \(byte \d+ is zero\)"):
            texts_of(tmp_path)


def test_strange_file_names_are_read_and_named(tmp_path: Path) -> None:
    name = os.fsdecode(b"-caf\xe9\n.txt")
    (tmp_path / name).write_text("text")
    (document,) = read_documents(tmp_path)
    assert document.key == "-caf\ufffd\n.txt" and document.called == f"input={tmp_path}/-caf\\udce9\\n.txt"


@pytest.mark.parametrize("values", [[1], [["a"]], [b"a"], [{"a": "b"}]])
def test_a_parquet_column_of_something_else_is_named(values: list, tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", values)
    kind = {int: "a number", list: "a list", bytes: "bytes", dict: "an object"}[type(values[0])]
    with pytest.raises(UserError, match=f"row 1: its column 'text' is {kind}, not a text; see --input.text_field"):
        texts_of(tmp_path / "a.parquet")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.parquet", "a.jsonl.gz"])
def test_a_pointer_of_git_lfs_is_no_text(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n")
    with pytest.raises(UserError, match=f"{name}: is a pointer of Git LFS"):
        texts_of(tmp_path / name)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_packed_files_and_utf_16_are_told_by_their_first_bytes(name: str, tmp_path: Path) -> None:
    content = jsonl(["one", "two"])
    (tmp_path / name).write_bytes(gzip.compress(content))
    with pytest.raises(UserError, match=f"{name}: is packed; give its name the ending .gz"):
        texts_of(tmp_path / name)
    (tmp_path / name).write_bytes(content.decode().encode("utf-16"))
    with pytest.raises(UserError, match=f"{name}: is text in UTF-16; convert it, .*iconv -f utf-16"):
        texts_of(tmp_path / name)
