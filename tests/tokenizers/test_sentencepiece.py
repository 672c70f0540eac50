"""Every tokenizer gives back exactly the text it was given, and refuses what would make it lie."""

import io
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from llm.errors import UserError
from llm.tokenizer import (
    ByteTokenizer,
    CharacterTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    TokenizerConfig,
    alphabet,
    load_tokenizer,
    train_sentencepiece,
)
from tests.shared import SHARED, needs_shared
from tests.tokenizers.helpers import CODE, NASTY, random_texts


@pytest.fixture(scope="module")
def model() -> bytes:
    return train_sentencepiece(CODE, 600)


@pytest.fixture(scope="module")
def trained(model: bytes) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(model)


@pytest.fixture(scope="module", params=["bytes", "sentencepiece", "unigram", "llama2"])
def tokenizer(request: pytest.FixtureRequest, trained: SentencePieceTokenizer) -> Tokenizer:
    if request.param == "bytes":
        return ByteTokenizer()
    if request.param == "sentencepiece":
        return trained
    if request.param == "unigram":
        return SentencePieceTokenizer(train_sentencepiece(CODE[:1], 500, model_type="unigram"))
    path = SHARED / "data/tokenizers/llama2/tokenizer.model"
    if not path.exists():
        pytest.skip("the folder ../shared with Llama 2's tokenizer is not beside this clone")
    return load_tokenizer(TokenizerConfig(kind="sentencepiece", path=str(path)))


@pytest.mark.parametrize("text", NASTY, ids=lambda text: repr(text[:20]))
def test_nasty_text_comes_back_exactly(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_random_unicode_comes_back_exactly(tokenizer: Tokenizer) -> None:
    for text in random_texts("\u2581"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_no_text_encodes_to_the_marks(tokenizer: Tokenizer) -> None:
    ids = {number for text in NASTY for number in tokenizer.encode(text)}
    assert not ids & {tokenizer.bos_id, tokenizer.eos_id}
    assert max(ids) < tokenizer.vocab_size


def test_the_marks_decode_to_nothing(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.bos_id, *tokenizer.encode(" a b"), tokenizer.eos_id]
    assert tokenizer.decode(ids) == " a b"


@pytest.mark.parametrize("threads", [1, 2])
def test_a_batch_encodes_like_its_texts(tokenizer: Tokenizer, threads: int) -> None:
    for texts in (NASTY, [text for text in NASTY if "\u2581" not in text]):
        for ids, text in zip(tokenizer.encode_batch(texts, threads), texts, strict=True):
            assert ids.dtype == np.uint32
            assert ids.tolist() == tokenizer.encode(text)


def test_saved_and_loaded_it_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    again = load_tokenizer(tokenizer.save(tmp_path), base=tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.encode("def f():\n  pass") == tokenizer.encode("def f():\n  pass")


def test_an_id_beyond_the_vocabulary_decodes_to_nothing_and_a_negative_one_is_refused(tokenizer: Tokenizer) -> None:
    """Models are padded to round numbers of rows, which sampling may choose."""
    beyond = [tokenizer.vocab_size, *tokenizer.encode("ab"), tokenizer.vocab_size + 500]
    assert tokenizer.decode(beyond) == "ab"
    with pytest.raises(ValueError, match="-1 is negative"):
        tokenizer.decode([0, -1])


def test_a_prompt_begins_as_every_training_document(tokenizer: Tokenizer) -> None:
    assert tokenizer.begin_ids == (tokenizer.bos_id,) and tokenizer.end_ids == (tokenizer.eos_id,)
    assert tokenizer.prompt_ids(" ab ") == [tokenizer.bos_id, *tokenizer.encode(" ab ")]
    assert tokenizer.prompt_ids("") == [tokenizer.bos_id]


def test_a_character_cut_in_the_middle_becomes_a_replacement_mark() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode("a\u00e9")[:-1]) == "a\ufffd"


def test_the_bytes_of_ids_add_up_to_the_texts_bytes(trained: SentencePieceTokenizer) -> None:
    for tokenizer in (trained, ByteTokenizer(), CharacterTokenizer(alphabet(NASTY))):
        bytes_of = tokenizer.token_bytes()
        for text in NASTY:
            assert bytes_of[tokenizer.encode(text)].sum() == len(text.encode())
        assert bytes_of[tokenizer.bos_id] == bytes_of[tokenizer.eos_id] == 0


def test_without_boundaries_a_line_end_with_its_indentation_is_one_piece(trained: SentencePieceTokenizer) -> None:
    crossing = SentencePieceTokenizer(train_sentencepiece(CODE, trained.vocab_size, boundaries="none"))
    assert any("\n    " in crossing.decode([number]) for number in range(crossing.vocab_size))
    assert not any("\n    " in trained.decode([number]) for number in range(trained.vocab_size))


def test_training_again_gives_the_same_file(model: bytes) -> None:
    assert train_sentencepiece(CODE, 600) == model


def test_a_long_text_is_sampled_the_same_way_each_time() -> None:
    first, again = (train_sentencepiece(CODE, 400, max_bytes=20_000) for _ in range(2))
    assert first == again != train_sentencepiece(CODE, 400)


@needs_shared
def test_llama_2_ids_are_those_of_sentencepiece_itself() -> None:
    path = SHARED / "data/tokenizers/llama2/tokenizer.model"
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = load_tokenizer(TokenizerConfig(kind="sentencepiece", path=str(path)))
    for text in ("Hello world", " a", "def f():\n    pass\n", "\u00e9\U0001f600"):
        assert tokenizer.encode(text) == reference.encode(text)


@needs_shared
def test_real_stories_come_back_exactly(trained: SentencePieceTokenizer) -> None:
    text = (SHARED / "data/text/tinystories_sample.txt").read_bytes()[:200_000].decode(errors="ignore")
    assert trained.decode(trained.encode(text)) == text


def test_characters_cover_their_text_and_name_a_stranger() -> None:
    text = "h\u00e9llo\r\n\U0001f600\u2581\x00"
    tokenizer = CharacterTokenizer(alphabet([text]))
    assert tokenizer.vocab_size == len(set(text)) + 2
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]) == text
    with pytest.raises(UserError, match=r"character 'z' \(U\+007A, at position 1 "):
        tokenizer.encode("hz")


def test_different_tokenizers_have_different_fingerprints(trained: SentencePieceTokenizer) -> None:
    tokenizers = [ByteTokenizer(), CharacterTokenizer("ab"), CharacterTokenizer("abc"), trained]
    assert len({tokenizer.fingerprint for tokenizer in tokenizers}) == len(tokenizers)


def test_a_missing_file_is_named_with_its_key(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.path=gone\.model: cannot read"):
        load_tokenizer(TokenizerConfig(kind="sentencepiece", path="gone.model"), base=tmp_path)


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_a_cut_off_model_is_named(model: bytes, tmp_path: Path, keep: float) -> None:
    (tmp_path / "t.model").write_bytes(model[: int(keep if keep >= 1 else keep * len(model))])
    with pytest.raises(UserError, match=r"t\.model"):
        load_tokenizer(TokenizerConfig(kind="sentencepiece", path="t.model"), base=tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"kind": "characters", "characters": "aa"}', b"\xff"])
def test_a_damaged_characters_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(UserError, match=r"t\.json: not a characters tokenizer"):
        load_tokenizer(TokenizerConfig(kind="characters", path="t.json"), base=tmp_path)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"normalization_rule_name": "nmt_nfkc", "byte_fallback": True}, "changes text"),
        ({"normalization_rule_name": "identity"}, "no byte fallback"),
        ({"normalization_rule_name": "identity", "byte_fallback": True, "bos_id": -1}, "no begin"),
    ],
)
def test_a_model_that_loses_text_is_refused(options: dict, reason: str) -> None:
    output = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CODE[0].splitlines()), model_writer=output, vocab_size=500, minloglevel=2, **options
    )
    with pytest.raises(UserError, match=reason):
        SentencePieceTokenizer(output.getvalue())


@pytest.mark.parametrize(("texts", "vocab_size"), [(["abc"], 4000), (CODE, 100)])
def test_training_that_cannot_work_names_the_vocabulary_size(texts: list[str], vocab_size: int) -> None:
    with pytest.raises(UserError, match=f"(?i)vocab_size={vocab_size}: .*vocabulary size"):
        train_sentencepiece(texts, vocab_size)


def test_training_on_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="text is empty"):
        train_sentencepiece(["", ""], 400)


def test_a_config_needs_a_file_exactly_when_the_kind_has_one() -> None:
    with pytest.raises(ValueError, match="has no file"):
        TokenizerConfig(kind="bytes", path="x")
    with pytest.raises(ValueError, match=r"tokenizer\.path is missing"):
        TokenizerConfig(kind="sentencepiece")
