"""What every tokenizer read from others' files promises: it gives back every text, never reads a special token out of
a text, and downloads nothing.
"""

import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llm.data.source import TokenSource
from llm.errors import UserError
from llm.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer
from llm.tokenizers.huggingface import HFTokenizer
from llm.tokenizers.tiktoken import TiktokenTokenizer
from tests.tokenizers.helpers import CODE, RANKS, TEXTS, from_shared, made_hf, opened, random_texts
from tools.shard import shard


@pytest.fixture(scope="module", params=["small ranks", "small json", "llama3", "llama4", "gpt2"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "small ranks":
        return TiktokenTokenizer(RANKS, "llama3")
    if request.param == "small json":
        return opened(made_hf())
    if request.param == "gpt2":
        return from_shared("hf", "gpt2/tokenizer.json")
    return from_shared("tiktoken", f"{request.param}/tokenizer.model")


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text[:20]))
def test_nasty_text_comes_back_exactly(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_random_unicode_comes_back_exactly(tokenizer: Tokenizer) -> None:
    for text in random_texts("\u0120"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("character", ["x", " ", "\n", "!", "\u3000", "\x1c", "\u4e9c"])
def test_a_run_too_long_for_the_library_comes_back_exactly(tokenizer: Tokenizer, character: str) -> None:
    text = "a" + character * 60_000 + "b"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_no_text_encodes_to_a_special_token(tokenizer: TiktokenTokenizer | HFTokenizer) -> None:
    spelled = [*TEXTS, *tokenizer.special_tokens, " ".join(tokenizer.special_tokens)]
    ids = {number for text in spelled for number in tokenizer.encode(text)}
    assert not ids & set(tokenizer.special_tokens.values())
    assert {tokenizer.bos_id, tokenizer.eos_id} <= set(tokenizer.special_tokens.values())


def test_special_tokens_decode_to_nothing(tokenizer: TiktokenTokenizer | HFTokenizer) -> None:
    ids = [tokenizer.bos_id, *tokenizer.encode(" a b"), *tokenizer.special_tokens.values(), tokenizer.eos_id]
    assert tokenizer.decode(ids) == " a b"


def test_the_bytes_of_ids_add_up_to_the_texts_bytes(tokenizer: TiktokenTokenizer | HFTokenizer) -> None:
    bytes_of = tokenizer.token_bytes()
    assert bytes_of.shape == (tokenizer.vocab_size,) and bytes_of.dtype == np.int64
    for text in TEXTS:
        assert bytes_of[tokenizer.encode(text)].sum() == len(text.encode())
    assert not bytes_of[list(tokenizer.special_tokens.values())].any()


def test_a_character_cut_in_the_middle_keeps_its_bytes(tokenizer: Tokenizer) -> None:
    for number, length in enumerate(tokenizer.token_bytes()[:300].tolist()):
        assert len(tokenizer.decode_bytes([number])) == length
    ids = tokenizer.encode("\U0001fae8")  # rare enough to have several tokens everywhere
    assert len(ids) > 1
    assert b"".join(tokenizer.decode_bytes([number]) for number in ids).decode() == "\U0001fae8"
    assert tokenizer.decode(ids[:1]) == "\ufffd"


@pytest.mark.parametrize("threads", [1, 2])
def test_a_batch_encodes_like_its_texts(tokenizer: Tokenizer, threads: int) -> None:
    for ids, text in zip(tokenizer.encode_batch(TEXTS, threads), TEXTS, strict=True):
        assert ids.dtype == np.uint32
        assert ids.tolist() == tokenizer.encode(text)


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb"])
def test_a_lone_surrogate_is_refused(tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(UnicodeEncodeError):
        tokenizer.encode(text)
    with pytest.raises(UnicodeEncodeError):
        tokenizer.encode_batch(["a", text], threads=2)


def test_an_id_beyond_the_vocabulary_decodes_to_nothing_and_a_negative_one_is_refused(tokenizer: Tokenizer) -> None:
    """Models are padded to round numbers of rows, which sampling may choose."""
    beyond = [tokenizer.vocab_size, *tokenizer.encode("ab"), tokenizer.vocab_size + 500]
    assert tokenizer.decode(beyond) == "ab"
    with pytest.raises(ValueError, match="-1 is negative"):
        tokenizer.decode([0, -1])


def test_a_prompt_begins_as_every_training_document(tokenizer: Tokenizer) -> None:
    assert tokenizer.begin_ids == (tokenizer.bos_id,) and tokenizer.end_ids[0] == tokenizer.eos_id
    assert tokenizer.prompt_ids(" ab ") == [tokenizer.bos_id, *tokenizer.encode(" ab ")]
    assert tokenizer.prompt_ids("") == [tokenizer.bos_id]


def test_saved_and_loaded_it_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = TokenizerConfig.model_validate_json(tokenizer.save(tmp_path).model_dump_json())
    again = load_tokenizer(config, base=tmp_path)
    assert (again.kind, again.fingerprint) == (tokenizer.kind, tokenizer.fingerprint)
    assert (again.bos_id, again.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert again.encode(CODE[0][:2000]) == tokenizer.encode(CODE[0][:2000])


@pytest.mark.parametrize("kind", ["tiktoken", "hf"])
def test_text_is_sharded_with_it_and_comes_back(kind: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello  <|endoftext|>\n")
    (tmp_path / "t").write_bytes(RANKS if kind == "tiktoken" else json.dumps(made_hf()).encode())
    given = {"variant": "llama4"} if kind == "tiktoken" else {"bos": "<|endoftext|>"}
    shard([str(tmp_path / "a.txt")], str(tmp_path / "out"), str(tmp_path / "t"), kind=kind, threads=2, **given)
    source = TokenSource.open(tmp_path / "out", verify=True)
    tokenizer = load_tokenizer(TokenizerConfig(kind=kind, path=str(tmp_path / "t"), **given))
    assert source.tokenizer_fingerprint == tokenizer.fingerprint
    tokens = source.row(0, source.n_tokens - 1).tokens
    assert tokenizer.decode(tokens) == "hello  <|endoftext|>\n"


def test_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("a tokenizer asked for the network")

    document = made_hf()
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert TiktokenTokenizer(RANKS, "llama3").encode("hello w")
    assert opened(document).encode("hello w")


def test_the_libraries_are_imported_only_when_used() -> None:
    script = (  # llm without its __init__.py, which imports torch: only the tokenizer is looked at
        "import sys, types; llm = sys.modules['llm'] = types.ModuleType('llm'); llm.__path__ = ['llm']; "
        "import llm.tokenizer; print({'tiktoken', 'tokenizers'} & set(sys.modules))"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr


def test_an_option_of_another_kind_is_refused() -> None:
    for kind, option in (
        ("sentencepiece", {"variant": "llama3"}),
        ("tiktoken", {"bos": "<s>"}),
        ("bytes", {"eos": "x"}),
    ):
        with pytest.raises(ValueError, match=rf"tokenizer\.{next(iter(option))}=.* leave it out"):
            TokenizerConfig(kind=kind, path=None if kind == "bytes" else "t", **option)


@pytest.mark.parametrize("kind", ["tiktoken", "hf"])
def test_a_missing_file_is_named_with_its_key(kind: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.path=gone: cannot read .*\)$"):
        load_tokenizer(TokenizerConfig(kind=kind, path="gone"), base=tmp_path)
    with pytest.raises(ValueError, match=rf"tokenizer\.path is missing: kind {kind} needs a file"):
        TokenizerConfig(kind=kind)
