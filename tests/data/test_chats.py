"""Rows of conversations, completions and preferences as samples: what a template writes, and what is plain text."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm.batch import IGNORE
from llm.data import chats
from llm.data.chats import plain_sample
from llm.data.conversation import Completion, Conversation
from llm.data.kinds import Asked
from llm.data.packed import Packed
from llm.data.sample import Sample
from llm.data.sources import SourceSpec
from llm.errors import UserError
from llm.tasks import RowsWanted, task_named
from llm.tokenizer import ByteTokenizer, Tokenizer, TokenizerConfig, load_tokenizer
from llm.tokenizers.chat import open_template
from llm.train.preflight import ALONE
from tests.data.sample_helpers import asked_for, chat, opened, write_rows
from tests.shared import SHARED, needs_shared

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
BOS, EOS = ByteTokenizer.bos_id, ByteTokenizer.eos_id


class FirstLetters:
    """Writes each message as the first letter of its role and its text, and an end mark; trains the assistant's."""

    fingerprint = "first letters"

    def sample(self, conversation: Conversation, train_on: str) -> Sample:
        tokens, weights, ends = [BOS], [0.0], []
        for message, weight in zip(conversation.messages, conversation.weights, strict=True):
            text = [ord(message["role"][0]), *message["content"].encode(), EOS]
            own = (1.0 if weight is None else weight) if message["role"] == "assistant" else 0.0
            tokens += text
            weights += [0.0, *[own] * (len(text) - 1)]
            ends.append(len(tokens))
        return Sample(np.array(tokens), np.array(weights, dtype=np.float32), np.array(ends))


@pytest.fixture(autouse=True)
def template(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chats, "template_of", lambda asked: FirstLetters())


def source_of(path: str, kind: str, folder: Path, columns: Mapping[str, str] | None = None, **options: Any) -> Packed:
    """The only source of a path, rows of 16."""
    spec = SourceSpec(path=path, kind=kind, columns=dict(columns or {}))
    wanted = RowsWanted([spec], None, str(folder / "cache"), 16, 0, None, chat=chat(**options))
    task = task_named("dpo" if kind == "preference" else "lm")
    (source,) = task.open_rows(wanted, ByteTokenizer(), ALONE).train.sources
    assert isinstance(source, Packed)
    return source


def rows_of(
    folder: Path, rows: list[Any], kind: str, columns: Mapping[str, str] | None = None, **options: Any
) -> Packed:
    return source_of(write_rows(folder / "a.jsonl", rows), kind, folder, columns, **options)


def text(tokens: np.ndarray) -> str:
    """Bytes as they are, the begin mark as <, the end mark as >, what is no target as _."""
    names = {BOS: "<", EOS: ">", IGNORE: "_"}
    return "".join(names.get(token, chr(token % 256)) for token in tokens.tolist())


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"messages": TURNS}, {}),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}, {}),
        ({"instruction": "hi", "input": "", "output": "yo"}, {}),
        ({"dialog": TURNS}, {"messages": "dialog"}),
    ],
)
def test_a_conversation_of_any_spelling_is_written_by_the_template(
    tmp_path: Path, row: Any, columns: dict[str, str]
) -> None:
    found = rows_of(tmp_path, [row], "chat", columns).read(0, 0)
    assert text(found.tokens) == "<uhi>ayo" and text(found.targets["lm"].labels) == "_____yo>"


def test_a_turns_weight_multiplies_its_targets(tmp_path: Path) -> None:
    turns = [{"role": "assistant", "content": "a", "loss_weight": weight} for weight in (0.25, 0.0)]
    found = rows_of(tmp_path, [{"messages": [*turns, {"role": "assistant", "content": "b"}]}], "chat").read(0, 0)
    target = found.targets["lm"]
    assert target.weights is not None and text(target.labels) == "_a>____b>"
    assert target.weights[target.labels >= 0].tolist() == [0.25, 0.25, 1, 1]


def test_messages_as_prompt_and_completion_go_through_the_template_and_only_the_latter_trains(tmp_path: Path) -> None:
    prompt = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    row = {"prompt": prompt, "completion": [{"role": "assistant", "content": "d"}]}
    found = rows_of(tmp_path, [row], "completion").read(0, 0)
    assert text(found.tokens) == "<ua>ab>uc>ad" and text(found.targets["lm"].labels) == "__________d>"


def test_texts_and_messages_in_one_source_are_refused_by_row(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a"}]
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": messages, "completion": messages}]
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: has messages, where the first row of its source has a pro"):
        rows_of(tmp_path, rows, "completion")


@pytest.mark.parametrize("plain", [True, False])
def test_the_answers_of_a_preference_lie_side_by_side(tmp_path: Path, plain: bool) -> None:
    row: dict[str, Any] = {"prompt": "q", "chosen": "ab", "rejected": "c"}
    if not plain:
        row["prompt"] = [{"role": "user", "content": "q"}]
    found = rows_of(tmp_path, [row], "preference").read(0, 0)
    first, second = ("<qab", "<qc") if plain else ("<uq>aab", "<uq>ac")
    assert text(found.tokens) == first + second
    labels = text(found.targets["dpo"].labels)
    assert labels == ("_ab>_c>" if plain else "____ab>____c>")
    assert found.values["pair"].tolist() == [1] * len(first) + [-1] * len(second)


@pytest.mark.parametrize(("key", "value"), [("train_on", "all"), ("max_length", "cut")])
def test_what_makes_no_sense_for_pairs_is_refused_with_its_key(tmp_path: Path, key: str, value: str) -> None:
    with pytest.raises(UserError, match=rf"chat\.{key}={value}: .*a\.jsonl is of kind preference"):
        rows_of(tmp_path, [{"prompt": "q", "chosen": "a", "rejected": "b"}], "preference", **{key: value})


def test_a_weight_in_an_answer_that_is_compared_is_refused_by_row(tmp_path: Path) -> None:
    answer = [{"role": "assistant", "content": "a", "loss_weight": 0.5}]
    row = {"prompt": [{"role": "user", "content": "q"}], "chosen": answer, "rejected": answer}
    with pytest.raises(UserError, match=r"a\.jsonl, line 1: a turn of an answer that is compared has a loss_weight"):
        rows_of(tmp_path, [row], "preference")


def test_a_conversation_is_cut_after_the_last_turn_that_fits(tmp_path: Path) -> None:
    turns = [{"role": role, "content": "x" * 3} for role in ("user", "assistant") * 3]
    long = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x" * 20}]
    rows = [{"messages": turns}, {"messages": long}]
    source = rows_of(tmp_path, rows, "chat", max_length="cut")  # 1 + 6 x 5 tokens, 17 fit
    assert sorted(text(source.read(k, 0).tokens) for k in range(2)) == ["<uq", "<uxxx>axxx>uxxx"]
    (note,) = [note for note in source.notes() if "samples cut" in note]
    assert "2 samples cut at the end of a turn, 1 of them with no target left" in note and "16 kept" in note


def test_a_conversation_is_known_by_its_content_in_any_spelling(tmp_path: Path) -> None:
    one = [{"instruction": f"q{i}", "output": f"a{i}", "id": i} for i in range(60)]
    other = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]}
        for i in reversed(range(60))
    ]  # fmt: skip
    held = []
    for number, rows in enumerate((one, other)):
        path = write_rows(tmp_path / f"{number}.jsonl", rows)
        rows_held = opened(path, asked_for(tmp_path), kind="chat", valid=0.3)["data.valid"].rows
        assert isinstance(rows_held, Packed)
        samples = range(rows_held.source.n_samples)
        held.append(sorted(text(rows_held.source.sample(i).tokens) for i in samples))
    assert held[0] == held[1] and 5 < len(held[0]) < 40


@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
def test_a_plain_completion_and_its_end_are_trained(tmp_path: Path, train_on: str) -> None:
    found = rows_of(tmp_path, [{"prompt": "ab", "completion": "cd", "id": 7}], "completion", train_on=train_on)
    row = found.read(0, 0)
    assert text(row.tokens) == "<abcd" and row.targets["lm"].weights is None
    assert text(row.targets["lm"].labels) == ("abcd>" if train_on == "all" else "__cd>")


def test_an_empty_completion_trains_its_end_and_columns_may_have_other_names(tmp_path: Path) -> None:
    columns = {"prompt": "q", "completion": "a"}
    row = rows_of(tmp_path, [{"q": "ab", "a": ""}], "completion", columns).read(0, 0)
    assert text(row.targets["lm"].labels) == "__>"


class Joining(ByteTokenizer):
    """Writes `bc` as one token."""

    vocab_size = ByteTokenizer.vocab_size + 1
    fingerprint = "joining"

    def encode(self, text: str) -> list[int]:
        parts = text.split("bc")
        joined = [[*super(Joining, self).encode(part), self.vocab_size - 1] for part in parts]
        return [token for part in joined for token in part][:-1]

    def token_bytes(self) -> np.ndarray:
        return np.append(super().token_bytes()[:-1], 2)


def test_a_token_over_the_seam_is_trained() -> None:
    sample = plain_sample(Joining(), Completion("ab", "cd"), whole=False)
    assert sample.tokens.tolist() == [BOS, ord("a"), Joining.vocab_size - 1, ord("d"), EOS]
    assert np.array_equal(sample.weights, [0, 0, 1, 1, 1])


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("completion", {"prompt": "a"}, r"has no prompt and completion \(see columns\); its columns are 'prompt'"),
        ("completion", {"prompt": "\ud800", "completion": ""}, "holds half a character"),
        ("chat", {"messages": [{"role": "judge", "content": "x"}]}, r"message 1 of its messages: unknown role 'judge'"),
        ("chat", {"text": "x"}, "has no messages, conversations, or instruction and output"),
        ("preference", {"prompt": "q", "chosen": "a"}, "has no chosen and rejected"),
    ],
)
def test_a_row_that_is_not_of_its_kind_is_named_by_file_and_row(
    tmp_path: Path, kind: str, row: Any, message: str
) -> None:
    with pytest.raises(UserError, match=rf"data\.train=.*a\.jsonl, line 1: {message}"):
        rows_of(tmp_path, [row], kind)


def test_a_name_of_a_column_that_the_kind_has_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.train\.columns\.answer: kind completion has prompt, completion, tools"):
        rows_of(tmp_path, [], "completion", {"answer": "a"})


def test_another_template_or_train_on_makes_other_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"instruction": "hi", "output": "yo"}])
    source_of(path, "chat", tmp_path)
    source_of(path, "chat", tmp_path, train_on="last")
    monkeypatch.setattr(FirstLetters, "fingerprint", "another")
    source_of(path, "chat", tmp_path)
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_the_template_is_asked_for_as_the_config_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    seen: list[Any] = []
    monkeypatch.setattr(chats, "open_template", lambda *given: seen.append(given))
    tokenizer = ByteTokenizer()
    options = chat(template="chatml", add_tokens=True)
    chats.template_of(Asked(tokenizer, tmp_path, 8, 0, chat=options, tokenizer_path="folder/of/it"))
    assert seen == [("chatml", tokenizer, Path("folder/of/it"), True)]


@lru_cache
def gpt2_with_chatml() -> Tokenizer:
    plain = load_tokenizer(TokenizerConfig(kind="hf", path=str(SHARED / "data/tokenizers/gpt2/tokenizer.json")))
    return open_template("chatml", plain, None, add_tokens=True).tokenizer


@needs_shared
@pytest.mark.parametrize("files", [["alpaca_en_demo.json"], ["v1_sft_demo.jsonl"], None])
def test_real_chats_fill_their_rows_to_the_last_hundredth(
    files: list[str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most 1 % or one row more than their tokens need; gpt2's tokens, control tokens of ChatML added."""
    monkeypatch.undo()
    folder = SHARED / "data" / "sft"
    tokenizer = gpt2_with_chatml()
    path = folder if files is None else folder / files[0]
    for seq_len in (1024, 4096):
        options = chat(template="chatml", add_tokens=True)
        rows = opened(str(path), Asked(tokenizer, tmp_path, seq_len, 0, chat=options), kind="chat")["data.train"].rows
        assert isinstance(rows, Packed)
        needed = -(-rows.source.manifest.tokens // seq_len)
        assert rows.n_rows <= max(needed + 1, 1.01 * needed)
