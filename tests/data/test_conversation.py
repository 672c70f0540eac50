"""Raw rows as conversations: the spellings that are in use, and one line for what is wrong."""

from typing import Any

import pytest

from llm.data.conversation import Completion, Conversation, read_completion, read_conversation, read_preference
from llm.errors import UserError

ASKED = {"role": "user", "content": "2+2?"}
SAID = {"role": "assistant", "content": "4"}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKED, SAID]},
        {"messages": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
        {"conversations": [{"from": "user", "value": "2+2?"}, {"from": "assistant", "value": "4"}]},
        {"instruction": "2+2?", "input": "", "output": "4"},
        {"messages": [{**ASKED, "content": [{"type": "text", "value": "2+"}, {"type": "text", "text": "2?"}]}, SAID]},
        {"messages": '[{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]'},
    ],
    ids=["messages", "ShareGPT in messages", "ShareGPT", "Alpaca", "parts", "JSON in a column of CSV"],
)
def test_every_spelling_is_the_same_conversation(row: dict[str, Any]) -> None:
    assert read_conversation(row) == Conversation((ASKED, SAID), (None, None))


def test_alpacas_input_follows_after_a_blank_line_and_its_history_comes_first() -> None:
    row = {"instruction": "Add.", "input": "2 2", "output": "4", "system": "Be brief.", "history": [["Hi", "Hello"]]}
    found = [(message["role"], message["content"]) for message in read_conversation(row).messages]
    assert found == [
        ("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Add.\n\n2 2"), ("assistant", "4")
    ]  # fmt: skip


def test_columns_name_the_files_columns() -> None:
    assert read_conversation({"dialog": [ASKED, SAID]}, {"messages": "dialog"}).messages == (ASKED, SAID)


def test_weights_of_turns_are_kept_and_train_false_is_none() -> None:
    row = {"messages": [{**ASKED, "loss_weight": 0.0}, {**SAID, "loss_weight": 0.5}, ASKED, {**SAID, "train": False}]}
    assert read_conversation(row).weights == (0.0, 0.5, None, 0.0)


def test_braces_and_image_tags_are_text_where_there_are_no_images() -> None:
    content = "{{ x }} {% raw %} <image>"
    row = {"messages": [{"role": "user", "content": content}, SAID], "images": []}
    assert read_conversation(row).messages[0]["content"] == content


def test_a_call_of_a_tool_and_what_was_thought_become_what_templates_read() -> None:
    call = {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'}
    thought = {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "4"}]}
    tools = '[{"type": "function", "function": {"name": "add"}}]'
    found = read_conversation({"conversations": [ASKED, call, {"from": "observation", "value": "4"}, thought],
                               "tools": tools})  # fmt: skip
    assert found.messages[1]["tool_calls"] == [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]
    assert found.messages[2] == {"role": "tool", "content": "4"}
    assert found.messages[3]["reasoning_content"] == "hm"
    assert found.tools == ({"type": "function", "function": {"name": "add"}},)


def test_a_completion_is_texts_or_messages_whose_prompt_does_not_train() -> None:
    assert read_completion({"prompt": "a", "completion": "b"}) == Completion("a", "b")
    found = read_completion({"prompt": [ASKED], "completion": [SAID]})
    assert found == Conversation((ASKED, SAID), (0.0, None))


def test_a_preference_without_a_prompt_begins_with_what_both_have() -> None:
    worse = {"role": "assistant", "content": "5"}
    found = read_preference({"chosen": [ASKED, SAID], "rejected": [ASKED, worse]})
    assert found.chosen == Conversation((ASKED, SAID), (0.0, None))
    assert found.rejected == Conversation((ASKED, worse), (0.0, None))
    assert read_preference({"prompt": "2+2?", "chosen": [SAID], "rejected": [worse]}) == found


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [{"role": "robot", "content": "x"}]}, "message 1 of its messages: unknown role 'robot'"),
        ({"messages": {"role": "user"}}, "its messages is an object, not a list"),
        ({"messages": [ASKED, 3]}, "message 2 of its messages is a number"),
        ({"messages": []}, "its messages is empty"),
        ({"messages": [{"role": "user"}]}, "message 1 of its messages has no content"),
        ({"messages": [{"role": "user", "content": 3}]}, "its content is a number"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "1 x part of an image"),
        ({"messages": [ASKED], "images": ["a.jpg"]}, "has 1 image in its columns, and 0 x <image>"),
        ({"messages": [{**SAID, "loss_weight": -1}]}, "its loss_weight must be a number from 0"),
        ({"messages": [{**SAID, "train": "no"}]}, "its train is a str, neither true nor false"),
        ({"text": "x"}, "has no messages, conversations, or instruction and output"),
    ],
)
def test_a_bad_row_is_refused_with_what_is_wrong(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError) as refused:
        read_conversation(row)
    assert reason in str(refused.value) and "\n" not in str(refused.value)


def test_a_mapped_column_that_is_missing_is_named() -> None:
    with pytest.raises(UserError, match="messages: dialog"):
        read_conversation({"messages": [ASKED]}, {"messages": "dialog"})
