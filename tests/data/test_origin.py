"""From a place in the token stream back to the file and line of its text."""

import gzip
import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm.data.build import build_source
from llm.data.documents import read_documents, split_key
from llm.data.source import Origin, TokenSource
from llm.errors import UserError
from llm.tokenizer import ByteTokenizer
from tests.data.helpers import flip_byte, make_source, random_texts

TEXTS = random_texts(60)


def from_files(output: Path, *inputs: Path, shard_bytes: int = 200) -> TokenSource:
    return build_source(read_documents(*inputs), ByteTokenizer(), output, total_bytes=0, shard_bytes=shard_bytes)


def write_files(folder: Path) -> Path:
    """Every kind of file; the JSONL has a blank line, so that lines are not documents."""
    folder.mkdir(parents=True)
    rows = [json.dumps({"text": f"row {i}"}) for i in range(3)]
    (folder / "a.jsonl").write_text(f"{rows[0]}\n\n{rows[1]}\n{rows[2]}\n")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    pq.write_table(pa.table({"text": ["one", "two"]}), folder / "c.parquet")
    (folder / "d").mkdir()
    (folder / "d" / "e:7.txt").write_text("plain")
    return folder


def expected_origins(folder: Path) -> list[Origin]:
    rows = [("a.jsonl", 1), ("a.jsonl", 3), ("a.jsonl", 4), ("b.jsonl.gz", 1), ("b.jsonl.gz", 2), ("b.jsonl.gz", 3)]
    rows += [("c.parquet", 1), ("c.parquet", 2)]
    return [*(Origin(str(folder / name), row) for name, row in rows), Origin(str(folder / "d/e:7.txt"), None)]


def manifest_of(source: TokenSource) -> dict:
    return json.loads((source.path / "manifest.json").read_text())


def test_every_token_is_found_in_its_document(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", TEXTS, shard_bytes=1500)
    assert len(source.manifest.shards) > 3
    lengths = [len(text.encode()) + 2 for text in TEXTS]
    expected = [(document, offset) for document, length in enumerate(lengths) for offset in range(length)]
    assert [source.document_at(position) for position in range(source.n_tokens)] == expected
    assert [source.document_length(document) for document in range(source.n_docs)] == lengths


def test_every_document_is_traced_to_its_file_and_line(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "in")
    source = from_files(tmp_path / "source", folder, shard_bytes=20)
    assert len(source.manifest.shards) > 3
    assert [source.origin(document) for document in range(source.n_docs)] == expected_origins(folder)
    assert str(source.origin(1)) == f"{folder}/a.jsonl:3" and str(source.origin(8)) == f"{folder}/d/e:7.txt"


def test_files_of_one_name_in_several_inputs_are_told_apart(tmp_path: Path) -> None:
    inputs = [write_files(tmp_path / name) / "a.jsonl" for name in ("x", "y")]
    source = from_files(tmp_path / "source", *inputs, tmp_path / "x")
    found = [source.origin(document) for document in range(source.n_docs)]
    assert found == [*expected_origins(tmp_path / "x")[:3], *expected_origins(tmp_path / "y")[:3],
                     *expected_origins(tmp_path / "x")]  # fmt: skip
    assert [(entry["path"], entry["documents"]) for entry in manifest_of(source)["folders"]] == [
        (str(tmp_path / "x"), 3), (str(tmp_path / "y"), 3), (str(tmp_path / "x"), 9),
    ]  # fmt: skip


def test_a_relative_input_is_kept_as_an_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path / "in")
    monkeypatch.chdir(tmp_path)
    source = from_files(tmp_path / "source", Path("in"))
    monkeypatch.chdir("/")
    assert TokenSource.open(source.path).origin(0) == Origin(str(tmp_path / "in" / "a.jsonl"), 1)


def test_the_fingerprint_is_of_the_content_wherever_it_lay(tmp_path: Path) -> None:
    here, there = (from_files(tmp_path / f"s{i}", write_files(tmp_path / f"in{i}")) for i in range(2))
    assert here.fingerprint == there.fingerprint
    assert here.origin(0) != there.origin(0)


def test_a_source_made_before_folders_were_kept_is_read_with_the_same_fingerprint(tmp_path: Path) -> None:
    source = from_files(tmp_path / "source", write_files(tmp_path / "in"))
    fields = manifest_of(source)
    del fields["folders"], fields["folders_digest"]
    # as version 1 of the manifest first stated it: the digest of all other fields
    content = {key: value for key, value in fields.items() if key != "fingerprint"}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    assert fields["fingerprint"] == hashlib.blake2b(canonical, digest_size=16).hexdigest() == source.fingerprint
    (source.path / "manifest.json").write_text(json.dumps(fields))
    old = TokenSource.open(source.path, verify=True)
    assert old.fingerprint == source.fingerprint
    assert (old.origin(1), old.origin(8)) == (Origin("a.jsonl", 3), Origin("d/e:7.txt", None))
    row, again = np.empty(9, dtype=np.int64), np.empty(9, dtype=np.int64)
    source.read(3, row), old.read(3, again)
    assert np.array_equal(row, again)


def test_documents_that_come_from_no_file_keep_their_names(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", ["a", "b"])
    assert "folders" not in manifest_of(source)
    assert source.origin(1) == Origin("doc1", None)


@pytest.mark.parametrize(("key", "value"), [("path", "/elsewhere"), ("documents", 8), ("documents", 0)])
def test_a_changed_folder_in_the_manifest_is_found(tmp_path: Path, key: str, value: object) -> None:
    source = from_files(tmp_path / "source", write_files(tmp_path / "in"))
    fields = manifest_of(source)
    fields["folders"][0][key] = value
    (source.path / "manifest.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"manifest\.json"):
        TokenSource.open(source.path)


def test_folders_without_their_digest_are_refused(tmp_path: Path) -> None:
    source = from_files(tmp_path / "source", write_files(tmp_path / "in"))
    fields = manifest_of(source)
    del fields["folders_digest"]
    (source.path / "manifest.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"manifest\.json"):
        TokenSource.open(source.path)


def test_a_damaged_name_is_found_when_it_is_asked_for(tmp_path: Path) -> None:
    source = from_files(tmp_path / "source", write_files(tmp_path / "in"), shard_bytes=1 << 20)
    shard = source.shard_path(source.manifest.shards[0])
    flip_byte(shard, shard.read_bytes().index(b"a.jsonl:3") + 2)
    opened = TokenSource.open(source.path)
    assert opened.document_at(0) == (0, 0)
    with pytest.raises(UserError, match=r"00000\.arrow.*names"):
        opened.origin(0)


def test_places_outside_are_refused(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", ["a", "b"])
    for position in (-1, source.n_tokens):
        with pytest.raises(IndexError):
            source.document_at(position)
    for document in (-1, source.n_docs):
        with pytest.raises(IndexError):
            source.origin(document)
        with pytest.raises(IndexError):
            source.document_length(document)


@pytest.mark.parametrize(
    ("key", "expected"),
    [("a.jsonl:12", ("a.jsonl", 12)), ("x/b.jsonl.gz:1", ("x/b.jsonl.gz", 1)), ("c.parquet:3", ("c.parquet", 3)),
     ("notes.txt", ("notes.txt", None)), ("notes:3", ("notes:3", None)), ("a.jsonl:x", ("a.jsonl:x", None))],
)  # fmt: skip
def test_a_key_is_a_file_and_a_line_where_files_have_lines(key: str, expected: tuple[str, int | None]) -> None:
    assert split_key(key) == expected
