"""A tokenizer.json gives the ids of the library tokenizers, and one that loses text or is damaged is refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from llm.errors import UserError
from llm.tokenizer import TokenizerConfig, load_tokenizer
from tests.shared import needs_shared
from tests.tokenizers.helpers import CODE, FILES, NASTY, PATTERNS, TEXTS, from_shared, made_hf, opened


@needs_shared
def test_gpt_2_ids_are_those_of_tokenizers_itself() -> None:
    path = FILES / "gpt2/tokenizer.json"
    tokenizer = from_shared("hf", "gpt2/tokenizer.json")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (50257, 50256, 50256)
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.encode("<|endoftext|>") == [27, 91, 437, 1659, 5239, 91, 29]
    reference = tokenizers.Tokenizer.from_file(str(path))
    for text in (*NASTY, CODE[0][:20_000]):  # these spell no special token of GPT-2
        ids = reference.encode(text).ids
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=False)


def test_the_library_alone_would_read_special_tokens_out_of_text() -> None:
    document = made_hf()
    marked = "a<|endoftext|>b"
    special = opened(document).eos_id
    assert special in tokenizers.Tokenizer.from_str(json.dumps(document)).encode(marked).ids
    assert special not in opened(document).encode(marked)


@pytest.mark.parametrize(
    ("special", "given", "expected"),
    [
        (("<|endoftext|>",), (None, None), ("<|endoftext|>", "<|endoftext|>")),
        (("<s>", "</s>"), (None, None), ("<s>", "</s>")),
        (
            ("<|eot_id|>", "<|begin_of_text|>", "<|end_of_text|>"),
            (None, None),
            ("<|begin_of_text|>", "<|end_of_text|>"),
        ),
        (("<s>", "</s>", "<eos>"), (None, "<eos>"), ("<s>", "<eos>")),
        (("[A]", "[Z]"), ("[A]", "[Z]"), ("[A]", "[Z]")),
    ],
)
def test_the_tokens_around_documents_are_found_or_named(
    special: tuple[str, ...], given: tuple[str | None, str | None], expected: tuple[str, str], tmp_path: Path
) -> None:
    tokenizer = opened(made_hf(special), *given)
    assert tokenizer.special_tokens == {token: number for number, token in enumerate(special)}
    assert (tokenizer.bos, tokenizer.eos) == expected
    again = load_tokenizer(tokenizer.save(tmp_path), tmp_path)
    assert (again.bos_id, again.eos_id) == (tokenizer.bos_id, tokenizer.eos_id) == tuple(map(special.index, expected))


@pytest.mark.parametrize(
    ("special", "given", "reason"),
    [
        ((), (None, None), r"set tokenizer\.eos .* none has a usual name"),
        (("</s>",), (None, None), r"set tokenizer\.bos .* none has a usual name: </s>"),
        (("<s>", "</s>", "<eos>"), (None, None), r"set tokenizer\.eos .* several .*\(</s>, <eos>\)"),
        (("<s>", "</s>"), ("<S>", None), r"tokenizer\.bos=<S> is not among its added tokens <s>, </s>"),
    ],
)
def test_tokens_around_documents_that_are_not_clear_must_be_named(
    special: tuple[str, ...], given: tuple[str | None, str | None], reason: str
) -> None:
    with pytest.raises(UserError, match=rf"t\.json: {reason}"):
        opened(made_hf(special), *given)


def added(content: str, number: int, **options: bool) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    return {"id": number, "content": content, **plain, **options}


def test_the_end_mark_is_not_read_out_of_text_even_where_the_file_would() -> None:
    document = made_hf()
    document["added_tokens"][0]["special"] = False
    tokenizer = opened(document)
    assert tokenizer.eos_id not in tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.decode([tokenizer.eos_id]) == ""


def test_an_added_token_for_blanks_is_part_of_the_text() -> None:
    document = made_hf()
    document["added_tokens"].append(added(" " * 7, 400))
    tokenizer = opened(document)
    assert tokenizer.encode("a" + " " * 7).count(400) == 1
    assert tokenizer.token_bytes()[400] == 7
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_truncation_and_padding_in_the_file_do_nothing() -> None:
    document = made_hf()
    cutting = tokenizers.Tokenizer.from_str(json.dumps(document))
    cutting.enable_truncation(5)
    cutting.enable_padding(length=64)
    tokenizer = opened(json.loads(cutting.to_str()))
    for text in ("a", CODE[0]):
        assert tokenizer.encode(text) == opened(document).encode(text)


def _set(*path_and_value: Any) -> Callable[[dict[str, Any]], None]:
    *path, key, value = path_and_value

    def change(document: dict[str, Any]) -> None:
        for step in path:
            document = document[step]
        document[key] = value

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_set("normalizer", {"type": "NFC"}), "normalizer NFC can change"),
        (_set("normalizer", {"type": "Lowercase"}), "normalizer Lowercase can change"),
        (_set("normalizer", {"type": "Sequence", "normalizers": [{"type": "StripAccents"}]}), "StripAccents"),
        (_set("pre_tokenizer", "add_prefix_space", True), "puts a space before the text"),
        (_set("pre_tokenizer", None), "not ByteLevel"),
        (_set("pre_tokenizer", {"type": "Whitespace"}), "pre-tokenizer Whitespace can change or drop"),
        (
            _set(
                "pre_tokenizer",
                {
                    "type": "Sequence",
                    "pretokenizers": [
                        {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False},
                        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
                    ],
                },
            ),
            "pre-tokenizer Split drops what it splits at",
        ),
        (_set("model", "type", "WordPiece"), "model is WordPiece"),
        (_set("model", "dropout", 0.1), "dropout=0.1"),
        (_set("model", "end_of_word_suffix", "</w>"), "end_of_word_suffix=</w>"),
        (lambda document: document["model"]["vocab"].pop("\u0100"), "byte 0x00 .* is not in its vocabulary"),
        (lambda document: document["added_tokens"].append(added("<mask>", 400, lstrip=True)), "swallows the blanks"),
        (lambda document: document["added_tokens"].append(added("\u00e9", 200)), "the id of other bytes"),
    ],
)
def test_a_file_that_loses_text_is_refused_with_the_reason(
    change: Callable[[dict[str, Any]], None], reason: str
) -> None:
    document = made_hf()
    change(document)
    with pytest.raises(UserError, match=rf"t\.json: the tokenizer changes text: .*{reason}"):
        opened(document)


def test_pre_tokenizers_that_only_split_are_taken() -> None:
    """Llama 3's tokenizer.json has this form."""
    split = {
        "type": "Split",
        "pattern": {"Regex": PATTERNS["llama3"]},
        "behavior": "Isolated",
        "invert": False,
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer = opened({**made_hf(), "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]}})
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"{}",
        b"[1]",
        b'{"model": 1}',
        b'{"kind": "characters", "characters": "ab"}',
        b'{"model": {"vocab": {}}, "added_tokens": [{"id": 1}]}',
        b'{"model": {"vocab": {}}, "normalizer": "NFC"}',
    ],
)
def test_a_damaged_json_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(UserError, match=r"t\.json: not a tokenizer\.json, or damaged"):
        load_tokenizer(TokenizerConfig(kind="hf", path="t.json"), base=tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_set("model", "merges", [["q", "nothing"]]), "not a tokenizer.json, or damaged"),
        (_set("added_tokens", 0, "id", 7), "<|endoftext|>' has id 7, but the library gives it 0"),
        (_set("model", "vocab", "!", 5), "share an id"),
    ],
)
def test_a_json_that_contradicts_itself_is_named(change: Callable[[dict[str, Any]], None], reason: str) -> None:
    document = made_hf()
    change(document)
    with pytest.raises(UserError, match=rf"t\.json: .*{re.escape(reason)}"):
        opened(document)
