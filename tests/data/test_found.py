"""What was found is said: before sharding, at the start of every run, also when the cache already has the shards."""

import json
from pathlib import Path

import pytest

from llm.data.documents import Reading, read_listings
from llm.data.found import Inventory, found_lines
from llm.data.listing import list_input
from llm.data.source import TokenSource
from llm.data.sources import SourceSpec, check_data
from llm.data.text import open_data, prepare_data
from llm.errors import UserError
from llm.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()


def write(folder: Path, **content: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in content.items():
        (folder / name.replace("_dot_", ".")).write_text(text)
    return folder


def lines_of(*paths: Path, separator: str | None = None) -> list[str]:
    inventory, listings = Inventory(), [list_input(path) for path in paths]
    documents = list(read_listings(listings, Reading(separator=separator), inventory))
    return list(found_lines("data.train=x", inventory.found(listings), len(documents), "--data.train.separator"))


def test_files_documents_and_bytes_are_said_by_ending(tmp_path: Path) -> None:
    rows = '{"text": "one"}\n{"text": "two"}\n'
    folder = write(tmp_path / "in", a_dot_jsonl=rows, b_dot_txt="text", pic_dot_png="x", README_dot_md="card")
    first, mixed = lines_of(folder)
    assert first == (
        "data.train=x: 2 files, 3 documents, 36 bytes (1 .jsonl, 2 documents, 32 bytes; 1 .txt, 1 document, 4 bytes); "
        "left out: README.md (a card beside data); pic.png (image, sound or font)"
    )
    assert "text files lie beside files of rows" in mixed


def test_one_file_is_one_short_line(tmp_path: Path) -> None:
    assert lines_of(write(tmp_path / "in", a_dot_txt="x" * 2500) / "a.txt") == [
        "data.train=x: 1 file, 1 document, 2.5 kB (.txt)"
    ]


def test_empty_files_and_documents_are_said(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", a_dot_jsonl='{"text": ""}\n{"text": "x"}\n', b_dot_jsonl="\n")
    assert lines_of(folder)[1:] == ["data.train=x: 1 document without any text", "data.train=x: no document in b.jsonl"]


@pytest.mark.parametrize("mark", ["<|endoftext|>", "</s>", "<|im_end|>"])
def test_a_text_with_document_marks_is_said_with_the_key_that_cuts_it(tmp_path: Path, mark: str) -> None:
    folder = write(tmp_path / "in", a_dot_txt=f"story\n{mark}\n" * 5, b_dot_txt=f"one {mark} is text")
    (warning,) = [line for line in lines_of(folder) if "warning" in line]
    assert f"a.txt has {mark} 5 times" in warning and f"--data.train.separator='{mark}'" in warning
    assert not [line for line in lines_of(folder, separator=mark) if "warning" in line]


def test_a_text_that_looks_like_json_lines_is_said(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", rows_dot_txt='{"text": "a"}\n{"text": "b"}\n', code_dot_txt="{\n}\n")
    (warning,) = [line for line in lines_of(folder) if "warning" in line]
    assert "rows.txt looks like JSON Lines" in warning


def test_a_run_says_the_same_whether_or_not_the_cache_has_the_shards(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", a_dot_txt="story</s>" * 5, b_dot_jsonl='{"text": "one"}\n', pic_dot_png="x")
    said = []
    for _ in range(2):
        prepare_data(str(folder), BYTES, tmp_path / "cache")
        ((_, source, _),) = open_data(str(folder), BYTES, tmp_path / "cache")
        said.append(source.notes)
    assert said[0] == said[1]
    assert "2 files, 2 documents" in said[0][0] and "left out: pic.png" in said[0][0]
    assert any("--data.train.separator='</s>'" in note for note in said[0])


def test_shards_say_what_they_were_made_of_and_old_ones_what_they_are(tmp_path: Path) -> None:
    write(tmp_path / "in", a_dot_txt="text")
    prepare_data(str(tmp_path / "in"), BYTES, tmp_path / "cache")
    (made,) = (tmp_path / "cache").iterdir()
    ((_, source, _),) = open_data(str(made), BYTES, tmp_path / "other")
    assert source.notes == (
        f"data.train={made}: token shards of 1 document, 6 tokens",
        f"data.train={made} was made of: 1 file, 1 document, 4 bytes (.txt)",
    )
    fields = json.loads((made / "manifest.json").read_bytes())
    del fields["found"], fields["found_digest"]
    (made / "manifest.json").write_text(json.dumps(fields))
    old = TokenSource.open(made)
    assert old.fingerprint == source.fingerprint  # what was found is no part of what the rows are
    assert open_data(str(made), BYTES, tmp_path / "other")[0][1].notes == source.notes[:1]
    assert "1 file, 1 document" in open_data(str(tmp_path / "in"), BYTES, tmp_path / "cache")[0][1].notes[0]


def test_facts_that_were_changed_are_found(tmp_path: Path) -> None:
    write(tmp_path / "in", a_dot_txt="text")
    prepare_data(str(tmp_path / "in"), BYTES, tmp_path / "cache")
    (made,) = (tmp_path / "cache").iterdir()
    (made / "manifest.json").write_text((made / "manifest.json").read_text().replace('".txt"', '".md"'))
    with pytest.raises(UserError, match=r"manifest\.json: damaged"):
        TokenSource.open(made)


def test_a_separator_without_text_files_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    specs = [SourceSpec(path=str(tmp_path / "a.jsonl"), separator="</s>"), SourceSpec(path=str(tmp_path), name="b")]
    with pytest.raises(UserError, match=r"data\.train\.0\.separator='</s>': is for text files, .*a\.jsonl has none"):
        check_data(specs)


def test_a_mixture_names_the_place_of_its_source(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"body": "two"}\n')
    specs = [SourceSpec(path=str(tmp_path / name)) for name in ("a.jsonl", "b.jsonl")]
    with pytest.raises(UserError, match=r"data\.train\.1\.path=.*b\.jsonl, line 2: .*see --data\.train\.1\.text_field"):
        prepare_data(specs, BYTES, tmp_path / "cache")
    with pytest.raises(UserError, match=r"data\.valid\.1\.path=.*nowhere: no such file"):
        check_data([specs[0], SourceSpec(path=str(tmp_path / "nowhere"))], key="data.valid")


def test_a_separator_that_no_text_has_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (warning,) = (line for line in lines_of(tmp_path, separator="\\n") if "warning" in line)  # a backslash and an n
    assert "--data.train.separator='\\n' is in no text file, so each file is one document" in warning
    (tmp_path / "b.txt").write_text("three\\nfour")
    assert not [line for line in lines_of(tmp_path, separator="\\n") if "warning" in line]


def test_splits_that_are_not_for_training_are_said_where_they_are_trained_on(tmp_path: Path) -> None:
    names = ("train-00000-of-00001.jsonl", "validation-00000-of-00001.jsonl", "test/a.jsonl", "testimony.jsonl")
    for name in names:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text('{"text": "one"}\n')

    def warnings(path: Path, key: str = "data.train") -> list[str]:
        prepare_data(str(path), BYTES, tmp_path / "cache", key=key)
        ((_, source, _),) = open_data(str(path), BYTES, tmp_path / "cache", key=key)
        return [note for note in source.notes if "not for training" in note]

    (warning,) = warnings(tmp_path / "in")
    assert "warning: test/a.jsonl and 1 more file, by the name not for training, is trained on" in warning
    assert not warnings(tmp_path / "in", key="data.valid")
    assert not warnings(tmp_path / "in" / "test") and not warnings(tmp_path / "in" / "train-00000-of-00001.jsonl")
