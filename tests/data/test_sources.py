"""`data:` of a run config: prepared once, opened by all, wrong things named by their key."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from llm.data.sources import SourceSpec
from llm.data.text import open_data, prepare_data
from llm.errors import UserError
from llm.tokenizer import ByteTokenizer, CharacterTokenizer
from tests.data.helpers import make_source

BYTES = ByteTokenizer()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "book.v2.txt"
    path.write_text("Some words that are trained on.\n" * 20)
    return path


def test_raw_text_is_prepared_then_opened(text: Path, tmp_path: Path) -> None:
    prepare_data(str(text), BYTES, tmp_path / "cache")
    ((name, source, weight),) = open_data(str(text), BYTES, tmp_path / "cache", verify=True)
    assert (name, weight, source.n_docs, source.n_bytes) == ("book", 1.0, 1, text.stat().st_size)


def test_preparing_again_does_nothing(text: Path, tmp_path: Path) -> None:
    prepare_data(str(text), BYTES, tmp_path / "cache")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    prepare_data(str(text), BYTES, tmp_path / "cache")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == before


def test_changed_text_and_other_tokenizers_are_prepared_anew(text: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    prepare_data(str(text), BYTES, cache)
    prepare_data(str(text), CharacterTokenizer("".join(sorted(set(text.read_text())))), cache)
    text.write_text("Another text.\n" * 20)
    prepare_data(str(text), BYTES, cache)
    ((_, source, _),) = open_data(str(text), BYTES, cache)
    assert source.n_bytes == text.stat().st_size
    assert len(list(cache.iterdir())) == 3


def test_a_native_source_is_opened_where_it_is(tmp_path: Path) -> None:
    native = make_source(tmp_path / "native", ["abc"] * 9)
    spec = [SourceSpec(path=str(native.path), weight=2.5, name="mine")]
    prepare_data(spec, BYTES, tmp_path / "cache")
    ((name, source, weight),) = open_data(spec, BYTES, tmp_path / "cache")
    assert (name, source.fingerprint, weight) == ("mine", native.fingerprint, 2.5)
    assert not (tmp_path / "cache").exists()


def test_a_source_in_other_ids_is_refused(tmp_path: Path) -> None:
    make_source(tmp_path / "native", ["abc"] * 9)
    with pytest.raises(UserError, match=r"data\.valid=.*native: made with another tokenizer \(bytes, 258 ids"):
        open_data(str(tmp_path / "native"), CharacterTokenizer("abc"), tmp_path, key="data.valid")


def test_a_missing_file_is_named_with_its_key(tmp_path: Path) -> None:
    for step in (prepare_data, open_data):
        with pytest.raises(UserError, match=r"data\.valid=.*nowhere\.txt: no such file"):
            step(str(tmp_path / "nowhere.txt"), BYTES, tmp_path, key="data.valid")


def test_shards_without_a_manifest_are_not_taken_for_text(tmp_path: Path) -> None:
    native = make_source(tmp_path / "native", ["abc"] * 9)
    (native.path / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"data\.train=.*native: has shards but no manifest"):
        prepare_data(str(native.path), BYTES, tmp_path / "cache")


def test_opening_what_was_not_prepared_says_so(text: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.train=.*book.v2.txt: has not been sharded into"):
        open_data(str(text), BYTES, tmp_path / "cache")


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_refused(weight: float) -> None:
    with pytest.raises(ValidationError, match="weight"):
        SourceSpec(path="x", weight=weight)


def test_a_folder_of_shards_without_text_is_refused(tmp_path: Path) -> None:
    make_source(tmp_path / "shards", ["", ""])
    with pytest.raises(UserError, match=r"^data\.valid=.*shards: all its 2 documents are empty$"):
        open_data(str(tmp_path / "shards"), BYTES, tmp_path / "cache", key="data.valid")
