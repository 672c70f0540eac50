"""Files of prompts: every form, and what is wrong is named by file and row before any work."""

import gzip
import json

import pytest

from llm.errors import UserError
from llm.generation.prompts import read_prompts

ROWS = [{"prompt": "one"}, {"prompt": "", "id": 3}, {"prompt": "\u2028 x ", "tags": ["a", {"b": None}]}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.ndjson", LINES.rstrip("\n")),
        ("a.json", LINES),
        ("a.json", json.dumps(ROWS, indent=1)),
        ("a.txt", LINES),  # whatever its name, it holds objects
        ("a.jsonl", "\ufeff" + LINES.replace("\n", "\r\n\r\n")),
    ],
)
def test_every_form_of_json_gives_the_same_rows(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode())
    rows, _ = read_prompts(tmp_path / name)
    assert [row.columns for row in rows] == ROWS
    assert [row.text for row in rows] == [row["prompt"] for row in ROWS]


def test_compressed_files_are_read(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
    assert [row.columns for row in read_prompts(tmp_path / "a.jsonl.gz")[0]] == ROWS


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_line_of_plain_text_is_a_prompt_as_it_stands(tmp_path, end):
    (tmp_path / "a.txt").write_bytes(("  one \r\n\n\u2028two\x85" + end).encode())
    rows, _ = read_prompts(tmp_path / "a.txt")
    assert [(row.number, row.text) for row in rows] == [(1, "  one "), (2, ""), (3, "\u2028two\x85")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"prompt": "x"}\n\n{"text": "x", "id": 1}\n', r"a.jsonl row 3: has no `prompt` \(its columns"),
        ("a.jsonl", b'{"prompt": 3}\n[1]\n', "row 1: `prompt` is a number, not a text; row 2: is a list"),
        ("a.jsonl", b'{"prompt": null}\n', "row 1: `prompt` is null, not a text"),
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": "x"\n', "row 2: not JSON"),
        ("a.jsonl", b"Once upon\n", "row 1: not JSON"),
        ("a.jsonl", b"nope\n" * 9, "row 5: .*; and 4 more rows"),
        ("a.jsonl", b'{"prompt": "x", "completion": "y"}\n', "row 1: has a column `completion`, which the output has"),
        ("a.jsonl", b'{"prompt": "x\\ud800"}\n', "row 1: holds half a character"),
        ("a.txt", b"one\ncaf\xe9\n", r"a.txt row 2: not UTF-8 \(byte 0xE9\)"),
        ("a.json", b'[{"prompt": "x"}, 7]', "row 2: is a number"),
        ("a.json", b'[{"prompt": "x"}', "a.json: not JSON"),
        ("a.txt", b"", "a.txt: holds no prompts"),
        ("a.jsonl", b"\n \n", "a.jsonl: holds no prompts"),
        ("a.gz", b"x", "a.gz: not a gzip file"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_by_file_and_row(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_prompts(tmp_path / name)
