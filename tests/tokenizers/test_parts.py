"""A long text encoded part by part has the ids of the whole, and takes memory for a part."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest

from llm.data import build
from llm.data.documents import read_documents
from llm.errors import UserError
from llm.tokenizer import (
    ByteTokenizer,
    CharacterTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    TokenizerConfig,
    load_tokenizer,
    train_sentencepiece,
)
from llm.tokenizers.parts import PART_CHARACTERS, anywhere, cut
from llm.tokenizers.tiktoken import MAX_CHARACTERS, TiktokenTokenizer
from tests.shared import SHARED
from tests.tokenizers.helpers import CODE, NASTY, RANKS, from_shared, made_hf, opened, random_texts

KINDS = ["bpe", "bpe over spaces", "llama2", "hf", "gpt2"]


def long_text(seed: int = 0) -> str:
    """About 100,000 characters of code, hard texts and all scripts, in no order."""
    draw = random.Random(seed)
    lines = [line for code in CODE for line in code.splitlines(keepends=True)]
    short = [text for text in NASTY if len(text) < 1000] + list(random_texts("\u2581"))
    texts = [draw.choice(short) if draw.random() < 0.2 else draw.choice(lines) for _ in range(3000)]
    return " ".join(texts[:1500]) + "".join(texts[1500:])


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "bpe":
        return SentencePieceTokenizer(train_sentencepiece(CODE, 600))
    if request.param == "bpe over spaces":  # pieces such as a line end with the indentation after it
        return SentencePieceTokenizer(train_sentencepiece(CODE, 900, boundaries="none"))
    if request.param == "hf":
        return opened(made_hf())
    if request.param == "gpt2":
        return from_shared("hf", "gpt2/tokenizer.json")
    path = SHARED / "data/tokenizers/llama2/tokenizer.model"
    if not path.exists():
        pytest.skip("the folder ../shared with Llama 2's tokenizer is not beside this clone")
    return load_tokenizer(TokenizerConfig(kind="sentencepiece", path=str(path)))


def test_the_parts_have_the_ids_of_the_whole(tokenizer: Tokenizer) -> None:
    for seed in range(2):
        text = long_text(seed)
        parts = cut(text, tokenizer._safe_at, size=200)
        assert "".join(parts) == text and len(parts) > len(text) / 400
        rest = tokenizer.encode_rest(parts[1:])
        assert [*tokenizer.encode(parts[0]), *np.concatenate(rest)] == tokenizer.encode(text)


def test_a_long_text_in_a_batch_has_the_ids_of_the_whole(tokenizer: Tokenizer) -> None:
    text = (long_text() * 4)[: PART_CHARACTERS + 100_000]
    short, long, empty = tokenizer.encode_batch(["short", text, ""], threads=2)
    assert len(tokenizer.parts(text)) > 1
    assert long.dtype == np.uint32 and long.tolist() == tokenizer.encode(text)
    assert (short.tolist(), empty.tolist()) == (tokenizer.encode("short"), tokenizer.encode(""))


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CharacterTokenizer("".join(sorted(set(long_text()))))])
def test_bytes_and_characters_are_cut_anywhere(tokenizer: Tokenizer) -> None:
    text = long_text() * 4
    parts = [ids for ids, _ in tokenizer.encode_long(text)]
    assert len(parts) == -(-len(text) // PART_CHARACTERS)
    assert np.array_equal(np.concatenate(parts), tokenizer.encode_batch([text])[0])


def test_tiktoken_is_cut_where_its_own_limit_cuts_it() -> None:
    tokenizer = TiktokenTokenizer(RANKS, "llama3")
    text = (long_text() * 10)[: 2 * MAX_CHARACTERS + 7]
    parts = [ids for ids, _ in tokenizer.encode_long(text, threads=2)]
    assert len(parts) == 3 and np.concatenate(parts).tolist() == tokenizer.encode(text)


def test_a_unigram_model_and_one_that_normalises_are_not_cut() -> None:
    text = "some words in a row " * 20_000
    for tokenizer in (
        SentencePieceTokenizer(train_sentencepiece(CODE[:1], 500, model_type="unigram")),
        SentencePieceTokenizer(train_sentencepiece(CODE, 600), lossy=True),
    ):
        assert tokenizer.parts(text) == [text]


def test_a_text_without_a_safe_place_stays_whole_and_one_far_off_is_found() -> None:
    def safe_at(text: str, i: int) -> bool:
        return text[i] == "|"

    assert cut("x" * 100, safe_at, size=10) == ["x" * 100]
    assert cut("x" * 45 + "|" + "x" * 9, safe_at, size=10) == ["x" * 45, "|" + "x" * 9]
    assert cut("", safe_at, size=10) == [""]
    assert cut("abcdef", anywhere, size=3) == ["abc", "def"]


def test_a_long_document_is_built_part_by_part_with_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "BLOCK_CHARACTERS", 1000)
    monkeypatch.setattr(build, "LINE_INTERVAL_S", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    tokenizer = ByteTokenizer()
    monkeypatch.setattr(tokenizer, "parts", lambda text: cut(text, anywhere, 5000), raising=False)
    text = long_text().replace("\x00", "")
    (tmp_path / "a.txt").write_text("short")
    (tmp_path / "b.txt").write_bytes(text.encode())
    documents = read_documents(tmp_path / "a.txt", tmp_path / "b.txt")
    size = sum((tmp_path / name).stat().st_size for name in ("a.txt", "b.txt"))
    source = build.build_source(documents, tokenizer, tmp_path / "source", total_bytes=size)
    assert source.n_docs == 2
    row = source.row(0, source.n_tokens - 1).tokens
    assert row.tolist() == [256, *b"short", 257, 256, *text.encode(), 257]
    shares = [line.split()[2] for line in capsys.readouterr().err.splitlines() if line.startswith("sharding")]
    assert len(set(shares)) > 10 and shares[-1] == "100%"


def test_an_error_in_a_long_document_counts_from_its_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "BLOCK_CHARACTERS", 1000)
    (tmp_path / "a.txt").write_text("a" * (PART_CHARACTERS + 10) + "b")
    documents = read_documents(tmp_path / "a.txt", key="data.train")
    with pytest.raises(UserError, match=rf"data\.train=.*a\.txt: character 'b' .* position {PART_CHARACTERS + 10} of"):
        build.build_source(documents, CharacterTokenizer("a"), tmp_path / "source", total_bytes=1)


def test_a_document_that_cannot_be_cut_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = ByteTokenizer()
    tokenizer.parts = lambda text: [text]  # type: ignore[method-assign]
    (tmp_path / "a.txt").write_text("a" * (build.BLOCK_CHARACTERS + 1))
    build.build_source(read_documents(tmp_path / "a.txt"), tokenizer, tmp_path / "source", total_bytes=1)
    assert "a.txt: 4,194,305 characters were encoded at once, which takes much memory" in capsys.readouterr().err
