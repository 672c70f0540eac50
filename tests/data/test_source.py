"""Shards and the stream of tokens over them; damage is found and named."""

import json
from pathlib import Path

import numpy as np
import pytest

from llm.data.shards import Shard
from llm.data.source import TokenSource
from llm.errors import UserError
from llm.tokenizer import ByteTokenizer, CharacterTokenizer
from tests.data.helpers import documents_of, flip_byte, make_source, random_texts, stream_of

TEXTS = random_texts(60)


@pytest.fixture
def source(tmp_path: Path) -> TokenSource:
    return make_source(tmp_path / "source", TEXTS, shard_bytes=1500)


def shard_path(source: TokenSource, number: int) -> Path:
    return source.shard_path(source.manifest.shards[number])


def position_of_tokens(path: Path, source: TokenSource, number: int) -> int:
    """A byte in the middle of a shard's token values."""
    tokens = Shard(path, source.manifest.shards[number]).tokens
    return path.read_bytes().index(tokens[10:40].tobytes())


def test_the_stream_is_all_documents_one_after_another(source: TokenSource) -> None:
    assert len(source.manifest.shards) > 3
    out = np.empty(source.n_tokens, dtype=np.int64)
    starts = source.read(0, out)
    assert np.array_equal(out, stream_of(TEXTS))
    assert np.array_equal(starts, np.flatnonzero(out == ByteTokenizer.bos_id))


def test_counts_are_those_of_the_original_texts(source: TokenSource) -> None:
    assert source.n_docs == len(TEXTS)
    assert source.n_bytes == sum(len(text.encode()) for text in TEXTS)
    assert source.n_tokens == source.n_bytes + 2 * len(TEXTS)


@pytest.mark.parametrize("seq_len", [1, 7, 64, 900])
def test_rows_follow_one_another_and_share_one_token(source: TokenSource, seq_len: int) -> None:
    stream = stream_of(TEXTS)
    n = source.n_rows(seq_len)
    assert n == (len(stream) - 1) // seq_len
    for k in {0, 1, n // 2, n - 1}:
        row = source.row(k, seq_len)
        assert np.array_equal(row.tokens, stream[k * seq_len : (k + 1) * seq_len + 1])
        assert np.array_equal(row.starts, np.flatnonzero(row.tokens == ByteTokenizer.bos_id))


def test_a_row_outside_is_refused(source: TokenSource) -> None:
    with pytest.raises(IndexError):
        source.row(source.n_rows(64), 64)


def test_shard_size_does_not_change_the_stream(source: TokenSource, tmp_path: Path) -> None:
    whole = make_source(tmp_path / "whole", TEXTS)
    assert len(whole.manifest.shards) == 1
    for k in range(whole.n_rows(50)):
        one, other = whole.row(k, 50), source.row(k, 50)
        assert np.array_equal(one.tokens, other.tokens) and np.array_equal(one.starts, other.starts)


def test_the_same_text_gives_the_same_source(source: TokenSource, tmp_path: Path) -> None:
    again = make_source(tmp_path / "again", TEXTS, shard_bytes=1500)
    assert again.fingerprint == source.fingerprint
    assert shard_path(again, 1).read_bytes() == shard_path(source, 1).read_bytes()


def test_a_large_vocabulary_takes_four_bytes_a_token(tmp_path: Path) -> None:
    tokenizer = CharacterTokenizer("".join(chr(0x100 + i) for i in range(70_000) if not 0xD800 <= 0x100 + i < 0xE000))
    texts = [tokenizer.characters[-3:]]
    source = make_source(tmp_path / "source", texts, tokenizer)
    assert source.manifest.dtype == "uint32"
    assert np.array_equal(source.row(0, source.n_tokens - 1).tokens, stream_of(texts, tokenizer))


def test_verify_passes_a_whole_source(source: TokenSource) -> None:
    assert TokenSource.open(source.path, verify=True).fingerprint == source.fingerprint


def test_a_flipped_bit_in_the_tokens_is_found_on_the_first_read(source: TokenSource) -> None:
    path = shard_path(source, 1)
    flip_byte(path, position_of_tokens(path, source, 1))
    opened = TokenSource.open(source.path)
    opened.row(0, 20)  # in the first shard, which is whole
    with pytest.raises(UserError, match=r"00001\.arrow.*crc32"):
        opened.read(0, np.empty(source.n_tokens, dtype=np.int64))


def test_a_flipped_bit_anywhere_is_found_by_verify(source: TokenSource) -> None:
    path = shard_path(source, 2)
    content = path.read_bytes()
    for position in np.linspace(0, len(content) - 1, 40).astype(int):
        flip_byte(path, position)
        with pytest.raises(UserError, match=r"00002\.arrow"):
            TokenSource.open(source.path, verify=True)
        path.write_bytes(content)


@pytest.mark.parametrize("keep", [0, 3, 100, -1])
def test_a_cut_off_shard_is_found_on_opening(source: TokenSource, keep: int) -> None:
    path = shard_path(source, 1)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"00001\.arrow"):
        TokenSource.open(source.path)


def test_a_missing_shard_is_found_on_opening(source: TokenSource) -> None:
    shard_path(source, 0).unlink()
    with pytest.raises(UserError, match=r"00000\.arrow: No such file"):
        TokenSource.open(source.path)


def test_shards_in_each_others_place_are_found(source: TokenSource) -> None:
    one, other = shard_path(source, 0), shard_path(source, 1)
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    with pytest.raises(UserError, match=r"0000[01]\.arrow"):
        TokenSource.open(source.path).row(0, 20)


def test_a_folder_without_a_manifest_is_no_source(source: TokenSource) -> None:
    (source.path / "manifest.json").unlink()
    with pytest.raises(UserError, match="no manifest.json"):
        TokenSource.open(source.path)


@pytest.mark.parametrize("content", ["", "[]", "{}", "nonsense", '{"fingerprint": 1}', "\x00" * 50])
def test_a_damaged_manifest_is_named(source: TokenSource, content: str) -> None:
    (source.path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json"):
        TokenSource.open(source.path)


def test_a_changed_number_in_the_manifest_is_found(source: TokenSource) -> None:
    path = source.path / "manifest.json"
    fields = json.loads(path.read_text())
    fields["tokens"] += 1
    path.write_text(json.dumps(fields))
    with pytest.raises(UserError, match="fingerprint"):
        TokenSource.open(source.path)


def test_an_existing_folder_is_never_overwritten(source: TokenSource) -> None:
    before = source.fingerprint
    with pytest.raises(FileExistsError):
        make_source(source.path, ["something else"])
    assert TokenSource.open(source.path, verify=True).fingerprint == before


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="doc1: character 'x'"):
        make_source(tmp_path / "source", ["ab", "axb", "b"], CharacterTokenizer("ab"))
    assert list(tmp_path.iterdir()) == []


def test_no_documents_make_no_source(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no documents"):
        make_source(tmp_path / "source", [])
    assert list(documents_of([])) == list(tmp_path.iterdir()) == []
