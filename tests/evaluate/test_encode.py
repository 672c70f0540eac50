"""Where a context ends and its continuation begins, in ids."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from llm.errors import UserError
from llm.evaluate.encode import Encoder, Window
from llm.tokenizers.base import Tokenizer, TokenizerConfig
from llm.tokenizers.chat import ChatTemplate
from llm.tokenizers.folder import folder_tokenizer
from llm.tokenizers.simple import ByteTokenizer

BYTES = ByteTokenizer()
BOS = BYTES.bos_id
PIECES = ["<unk>", "<s>", "</s>", "▁", "w", "o", "r", "l", "d", "a", "▁w", "▁wo", "▁wor", "ld", "▁world", "▁a", "▁al"]
PIECES += [f"<0x{byte:02X}>" for byte in range(256)]
MERGES = [("▁", "w"), ("▁w", "o"), ("▁wo", "r"), ("l", "d"), ("▁wor", "ld"), ("▁", "a"), ("▁a", "l")]


def ids(text: str) -> tuple[int, ...]:
    return tuple(text.encode())


def small(path: Path, *, begins: bool = True, ends: bool = False) -> Tokenizer:
    """A folder's tokenizer with few pieces, in the manner of Llama 2: it puts a space before a text and joins words."""
    vocab = {piece: i for i, piece in enumerate(PIECES)}
    inner = tokenizers.Tokenizer(models.BPE(vocab, MERGES, unk_token="<unk>", byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    metaspace = decoders.Metaspace(prepend_scheme="first", split=False)
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), metaspace])
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    around = [*(["<s>"] if begins else []), "$A", *(["</s>"] if ends else [])]
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single=" ".join(around), special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    inner.save(str(path / "tokenizer.json"))
    marks = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (path / "tokenizer_config.json").write_text(json.dumps(marks))
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": len(PIECES)}))
    return folder_tokenizer(path, TokenizerConfig(kind="hf", path=str(path), lossy=True))


def numbers(*pieces: str) -> tuple[int, ...]:
    return tuple(PIECES.index(piece) for piece in pieces)


def test_blanks_at_the_end_of_a_context_are_scored_with_its_continuation() -> None:
    pair = Encoder(BYTES, 64).pair("ab \n", " c")
    assert (pair.context, pair.target) == ((BOS, *ids("ab")), ids(" \n c"))
    assert not pair.truncated and not pair.joint


@pytest.mark.parametrize("context", ["", " "])
def test_an_empty_context_is_what_begins_a_text_and_is_not_scored(context: str) -> None:
    pair = Encoder(BYTES, 64).pair(context, "c")
    assert (pair.context, pair.target) == ((BOS,), ids(f"{context}c"))


def test_the_continuation_is_encoded_with_its_context_so_that_no_space_is_put_before_it(tmp_path: Path) -> None:
    pair = Encoder(small(tmp_path), 64).pair("world", " al")
    assert (pair.context, pair.target) == (numbers("<s>", "▁world"), numbers("▁al"))


def test_a_continuation_without_tokens_of_its_own_is_scored_with_the_last_token_of_its_context(tmp_path: Path) -> None:
    pair = Encoder(small(tmp_path), 64).pair("a wor", "ld")
    assert (pair.context, pair.target, pair.joint) == (numbers("<s>", "▁a"), numbers("▁world"), True)


def test_a_continuation_that_shares_a_token_with_its_context_is_scored_from_that_token_on(tmp_path: Path) -> None:
    pair = Encoder(small(tmp_path), 64).pair("a wor", "ld wo")
    assert (pair.context, pair.target, pair.joint) == (numbers("<s>", "▁a"), numbers("▁world", "▁wo"), True)


def test_a_context_that_is_one_token_with_its_continuation_leaves_what_begins_a_text(tmp_path: Path) -> None:
    pair = Encoder(small(tmp_path), 64).pair("wor", "ld")
    assert (pair.context, pair.target, pair.joint) == (numbers("<s>"), numbers("▁world"), True)


def test_a_begin_mark_that_the_context_spells_is_not_put_there_again(tmp_path: Path) -> None:
    tokenizer = small(tmp_path)
    assert Encoder(tokenizer, 64).pair("<s>wor", " a").context.count(1) == 1
    assert Encoder(tokenizer, 64).prompt("<s>wor", 4)[0].count(1) == 1


def test_a_tokenizer_that_puts_no_begin_mark_has_none_in_a_context_but_an_empty_one(tmp_path: Path) -> None:
    encoder = Encoder(small(tmp_path, begins=False), 64)
    assert encoder.pair("world", " al").context == numbers("▁world")
    assert encoder.pair("", "world").context == (1,)
    assert encoder.pair("wor", "ld").context == (1,)


def test_an_end_mark_that_the_tokenizer_puts_after_every_prompt_stands_in_none(tmp_path: Path) -> None:
    encoder = Encoder(small(tmp_path, ends=True), 64)
    assert encoder.pair("world", " al") == Encoder(small(tmp_path), 64).pair("world", " al")
    assert encoder.prompt("world", 4) == (numbers("<s>", "▁world"), False)


def test_a_long_context_is_cut_on_the_left_after_its_begin_mark() -> None:
    encoder = Encoder(BYTES, 6)
    assert encoder.pair("abc", "def").truncated is False  # 7 ids, the last of which is only scored
    pair = encoder.pair("abcdefgh", "xyz")
    assert (pair.context, pair.target, pair.truncated) == ((BOS, *ids("fgh")), ids("xyz"), True)
    assert encoder.pair("abc", "uvwxyz").context == (BOS,)


def test_a_continuation_longer_than_the_context_is_refused() -> None:
    with pytest.raises(UserError, match="a continuation of 7 tokens is longer than the model's context of 6"):
        Encoder(BYTES, 6).pair("a", "1234567")


def test_nothing_to_score_is_refused() -> None:
    with pytest.raises(UserError, match="the continuation has no tokens"):
        Encoder(BYTES, 6).pair("", "")


def test_half_a_character_is_refused() -> None:
    with pytest.raises(UserError, match="half a character"):
        Encoder(BYTES, 6).pair("a", "\ud800")


def test_a_prompt_is_cut_on_the_left_to_leave_room_for_what_is_generated() -> None:
    encoder = Encoder(BYTES, 8)
    assert encoder.prompt("abcd", 3) == ((BOS, *ids("abcd")), False)
    assert encoder.prompt("abcdef", 3) == ((BOS, *ids("cdef")), True)
    with pytest.raises(UserError, match="max_new_tokens=8 leaves no room"):
        encoder.prompt("a", 8)


def reference_windows(tokens: list[int], begin: int, size: int) -> Iterator[Window]:
    """lm-eval 0.4.13: get_rolling_token_windows with a context of 1, made disjoint."""
    first = min(size, len(tokens))
    pairs = [([begin, *tokens[: first - 1]], tokens[:first])]
    done = first
    while done < len(tokens):
        n = min(len(tokens) - done, size)
        end = done + n
        pairs.append((tokens[end - size - 1 : end - 1], tokens[end - n : end]))
        done = end
    for context, target in pairs:
        yield tuple(context[: len(context) - (len(target) - 1)]), tuple(target)


@pytest.mark.parametrize("length", [1, 5, 6, 7, 11, 12, 13, 30])
def test_windows_score_each_token_once_and_the_last_has_all_the_context_that_fits(length: int) -> None:
    text = "abcdefghijklmnopqrstuvwxyzABCD"[:length]
    windows = Encoder(BYTES, 6).windows(text)
    assert windows == list(reference_windows(list(text.encode()), BOS, 6))
    assert [token for _, target in windows for token in target] == list(text.encode())
    assert all(len(context) >= 1 and len(context) + len(target) - 1 <= 6 for context, target in windows)


def test_windows_of_no_text_are_none() -> None:
    assert Encoder(BYTES, 6).windows("") == []


TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_a_conversation_is_what_its_template_says_and_its_answer_follows_at_once() -> None:
    template = ChatTemplate(TEMPLATE, "t.jinja", BYTES)
    pair = Encoder(BYTES, 200).answer(template, [{"role": "user", "content": "hi"}], "yes")
    assert pair.context == (*ids("user: hi"), BYTES.eos_id, *ids("assistant:"))
    assert pair.target == ids(" yes")
    assert Encoder(BYTES, 200).conversation(template, [{"role": "user", "content": "hi"}], 4) == (
        (*pair.context, *ids(" ")), False
    )  # fmt: skip


def test_control_tokens_that_an_answer_or_a_question_spells_are_text() -> None:
    template = ChatTemplate(TEMPLATE, "t.jinja", BYTES)
    pair = Encoder(BYTES, 200).answer(template, [{"role": "user", "content": "</s>"}], "</s>")
    assert pair.context == (*ids("user: </s>"), BYTES.eos_id, *ids("assistant:"))
    assert pair.target == ids(" </s>")


def test_a_rendered_conversation_is_encoded_as_its_messages_are() -> None:
    template = ChatTemplate(TEMPLATE, "t.jinja", BYTES)
    said = [{"role": "user", "content": "hi"}]
    text, typed = template.prompt_text(said)
    encoder = Encoder(BYTES, 64)
    assert encoder.rendered(template, text, typed, "c") == encoder.answer(template, said, "c")
    assert encoder.rendered_prompt(template, text, 4) == encoder.conversation(template, said, 4)
