"""Which files a path stands for: nothing is skipped without a word, and nothing is read for what it is not."""

import os
from pathlib import Path

import pytest

from llm.data.formats import file_type, shown
from llm.data.listing import LeftOut, list_input, summary
from llm.errors import UserError
from tests.data.helpers import make_source


def put(folder: Path, *names: str, content: str = "text\n") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def read(folder: Path) -> list[str]:
    return [file.name for file in list_input(folder).files]


def left_out(folder: Path) -> dict[str, str]:
    return dict(list_input(folder).left_out)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jsonl", ("lines", "")), ("a.JSONL", ("lines", "")), ("a.ndjson", ("lines", "")), ("a.jl", ("lines", "")),
        ("a.v2.jsonl.gz", ("lines", "gz")), ("a.Json.ZST", ("json", "zst")), ("a.json", ("json", "")),
        ("a.PARQUET", ("parquet", "")), ("a.pq", ("parquet", "")), ("a.txt", ("text", "")), ("a.md.xz", ("text", "xz")),
        ("train.en", ("text", "")), ("Makefile", ("text", "")), ("corpus.bz2", ("text", "bz2")), ("a.py", ("text", "")),
        ("a.csv", ("csv", "")), ("a.csv.gz", ("csv", "gz")), ("a.feather", ("arrow", "")), ("a.arrow.gz", None),
        ("a.tsv", None), ("a.xlsx.gz", None), ("a.tar.gz", None), ("a.parquet.gz", None), ("a.PDF", None),
        ("a.safetensors", None), ("photo.jpeg", None), ("notes.ipynb", None),
    ],
)  # fmt: skip
def test_an_ending_decides_what_a_file_is_in_any_case(name: str, expected: tuple[str, str] | None) -> None:
    found = file_type(name)
    assert (found and (found.format, found.compression)) == expected


def test_what_holds_no_text_is_left_out_of_a_folder_by_name(tmp_path: Path) -> None:
    put(tmp_path, "a.txt", "b/c.py", "a.png", "b/w.safetensors", ".git/config", ".DS_Store", "_SUCCESS", ".a.txt.crc")
    put(tmp_path, "x.lock", "tokenizer.json", "dataset_infos.json", "b/config.json")
    assert read(tmp_path) == ["a.txt", "b/c.py"]
    assert left_out(tmp_path) == {
        "a.png": "image, sound or font", "b/w.safetensors": "binary", ".git/": "hidden", ".DS_Store": "hidden",
        "_SUCCESS": "about the data", ".a.txt.crc": "hidden", "x.lock": "about the data",
        "tokenizer.json": "of a model or tokenizer", "dataset_infos.json": "about the data",
        "b/config.json": "of a model or tokenizer",
    }  # fmt: skip


def test_cards_are_left_out_beside_rows_and_read_among_texts(tmp_path: Path) -> None:
    put(tmp_path / "texts", "README.md", "a.txt", "LICENSE")
    assert read(tmp_path / "texts") == ["LICENSE", "README.md", "a.txt"]
    put(tmp_path / "rows", "README.md", "data/a.jsonl", "LICENSE", "notes.txt")
    assert read(tmp_path / "rows") == ["data/a.jsonl", "notes.txt"]
    assert left_out(tmp_path / "rows") == {"README.md": "a card beside data", "LICENSE": "a card beside data"}


@pytest.mark.parametrize("name", ["rows.xlsx", "texts.zip", "book.pdf", "shard.arrow.gz", "a.tsv.gz"])
def test_what_may_hold_text_in_another_form_is_refused_also_in_a_folder(tmp_path: Path, name: str) -> None:
    put(tmp_path, "a.txt", name)
    with pytest.raises(UserError, match=f"data.train=.*{name}: cannot be read as text; possible are .*jsonl"):
        list_input(tmp_path, "data.train")


def test_a_file_that_is_named_itself_is_read_or_refused_never_left_out(tmp_path: Path) -> None:
    put(tmp_path, "README.md", "a.png", ".hidden.txt")
    assert [file.name for file in list_input(tmp_path / "README.md").files] == ["README.md"]
    assert [file.name for file in list_input(tmp_path / ".hidden.txt").files] == [".hidden.txt"]
    with pytest.raises(UserError, match=r"a\.png: cannot be read as text"):
        list_input(tmp_path / "a.png")


def test_links_are_followed_once_and_loops_end(tmp_path: Path) -> None:
    put(tmp_path, "data/real/a.txt", "elsewhere/b.txt")
    folder = tmp_path / "data"
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "again").symlink_to(folder / "real")
    (folder / "real" / "up").symlink_to(folder)
    (folder / "c.txt").symlink_to(tmp_path / "elsewhere" / "b.txt")
    listing = list_input(folder)
    assert [file.name for file in listing.files] == ["c.txt", "linked/b.txt", "real/a.txt"]
    assert dict(listing.left_out) == {
        "again/": "a link to real/, which is read",
        "real/up/": "a link to the folder itself, which is read",
    }
    assert listing.same_files() == [("c.txt", 1)]


def test_a_link_to_nothing_is_refused_by_name(tmp_path: Path) -> None:
    put(tmp_path, "a.txt")
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "unmounted" / "b.jsonl")
    with pytest.raises(UserError, match=r"k=.*b\.jsonl: a link to .*unmounted/b\.jsonl, which is not there"):
        list_input(tmp_path, "k")
    with pytest.raises(UserError, match=r"k=.*b\.jsonl: a link to .*unmounted/b\.jsonl, which is not there"):
        list_input(tmp_path / "b.jsonl", "k")
    (tmp_path / "b.jsonl").unlink()
    (tmp_path / "me.txt").symlink_to(tmp_path / "me.txt")
    with pytest.raises(UserError, match=r"me\.txt: a link to .*me\.txt, Too many levels"):
        list_input(tmp_path)


def test_a_pipe_is_named_in_a_folder_and_refused_alone(tmp_path: Path) -> None:
    put(tmp_path, "a.txt")
    os.mkfifo(tmp_path / "pipe")
    assert left_out(tmp_path) == {"pipe": "no regular file"}
    with pytest.raises(UserError, match="pipe: is no regular file"):
        list_input(tmp_path / "pipe")


def test_a_folder_and_a_file_that_cannot_be_read_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "a.txt", "locked/b.txt")
    scandir = os.scandir

    def refusing(path: Path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)  # root, who may run the tests, can read everything
    with pytest.raises(UserError, match=r"k=.*locked: the folder cannot be read \(Permission denied\)"):
        list_input(tmp_path, "k")
    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "b.txt")
    with pytest.raises(UserError, match=r"k=.*locked/b\.txt: cannot be read \(Permission denied\)"):
        list_input(tmp_path, "k")


def test_strange_names_are_listed_and_shown_on_one_line(tmp_path: Path) -> None:
    names = ["-dash.txt", "two\nlines.txt", " blank .txt", os.fsdecode(b"caf\xe9.txt"), "\u00fc\u4e9c.txt", "a:3.txt"]
    put(tmp_path, *names)
    assert read(tmp_path) == sorted(names)
    assert shown(names[1]) == "two\\nlines.txt" and shown(names[3]) == "caf\\udce9.txt" and shown(names[4]) == names[4]


def test_what_the_project_wrote_itself_is_left_out(tmp_path: Path) -> None:
    put(tmp_path, "a.txt", "cache/x-1/notes.txt", "run/config.yaml", "run/log.txt", "run/metrics.jsonl", "deep/b.txt")
    make_source(tmp_path / "deep" / "shards_of_before", ["a", "b"])
    listing = list_input(tmp_path, cache_dir=tmp_path / "cache")
    assert [file.name for file in listing.files] == ["a.txt", "deep/b.txt"]
    assert dict(listing.left_out) == {
        "cache/": "the cache, data.cache_dir",
        "run/": "a run folder",
        "deep/shards_of_before/": "token shards, a source of their own",
    }


def test_a_folder_with_nothing_to_read_says_what_was_left_out(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "b.png")
    with pytest.raises(UserError, match=r"the folder has no files to read; left out: a\.png, b\.png \(image, sound"):
        list_input(tmp_path)


def test_a_summary_names_a_few_of_each_reason() -> None:
    many = [LeftOut(f"{i}.png", "image") for i in range(5)] + [LeftOut(".git/", "hidden")]
    assert summary(many) == "0.png, 1.png, 2.png and 2 more (image); .git/ (hidden)"
