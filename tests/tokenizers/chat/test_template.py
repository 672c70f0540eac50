"""Conversations as samples: which tokens they are, and which of them train.

Expected samples are written by hand as text: a control token as its name, what trains between brackets. The tokenizer
is that of bytes, so that every character of ASCII is one token.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm.data.conversation import Completion, read_conversation
from llm.errors import UserError
from llm.tokenizer import ByteTokenizer, TokenizerConfig, load_tokenizer
from llm.tokenizers.chat import ChatTemplate, open_template
from llm.tokenizers.export import export_tokenizer
from tests.tokenizers.helpers import made_hf, opened

OURS = ("chatml", "llama3", "llama4", "gemma", "mistral")


def chat(*said: str, **more: Any) -> Any:
    """A conversation of `said`, user and assistant in turn."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    return read_conversation({"messages": messages, **more})


def template(name: str = "chatml") -> ChatTemplate:
    return open_template(name, ByteTokenizer(), None, add_tokens=True)


def shown(found: ChatTemplate, conversation: Any, train_on: Any = "assistant") -> str:
    """The sample as text; { and } around what trains, with a weight other than 1 before them."""
    sample = found.sample(conversation, train_on)
    names = {number: name for name, number in found.tokenizer.control_tokens.items()}
    text, before = b"", 0.0
    for number, weight in [*zip(sample.tokens.tolist(), sample.weights.tolist(), strict=True), (None, 0.0)]:
        if weight != before:
            text += (b"}" if before else b"") + (b"" if weight in (0, 1) else str(weight).encode())
            text += b"{" if weight else b""
        before = weight
        if number is not None:
            text += names[number].encode() if number in names else bytes([number])
    return text.decode()


USER, SAYS, END = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>"


def weighted(weight: float) -> Any:
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "loss_weight": weight}]
    return read_conversation({"messages": [*said, {"role": "user", "content": "c"},
                                           {"role": "assistant", "content": "d"}]})  # fmt: skip


SYSTEM = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("conversation", "train_on", "expected"),
    [
        (chat("a", "b", "c", "d"), "assistant",
         f"{USER}a{END}\n{SAYS}{{b{END}}}\n{USER}c{END}\n{SAYS}{{d{END}}}\n"),
        (chat("a", "b", "c", "d"), "last", f"{USER}a{END}\n{SAYS}b{END}\n{USER}c{END}\n{SAYS}{{d{END}}}\n"),
        (chat("a", "b"), "all", f"<|im_start|>{{user\na{END}\n{SAYS}b{END}\n}}"),
        (read_conversation({"messages": SYSTEM}), "assistant",
         f"<|im_start|>system\ns{END}\n{USER}q{END}\n{SAYS}{{a{END}}}\n"),
        (chat("a", ""), "assistant", f"{USER}a{END}\n{SAYS}{{{END}}}\n"),
        (chat("é \U0001f600", " \n\u4e9c "), "assistant",
         f"{USER}é \U0001f600{END}\n{SAYS}{{ \n\u4e9c {END}}}\n"),
        (weighted(0.0), "assistant", f"{USER}a{END}\n{SAYS}b{END}\n{USER}c{END}\n{SAYS}{{d{END}}}\n"),
        (weighted(0.5), "assistant", f"{USER}a{END}\n{SAYS}0.5{{b{END}}}\n{USER}c{END}\n{SAYS}{{d{END}}}\n"),
    ],
    ids=["turns", "last", "all", "system", "empty answer", "unicode", "weight 0", "weight 0.5"],
)  # fmt: skip
def test_the_answers_train_with_their_end_marks(conversation: Any, train_on: str, expected: str) -> None:
    assert shown(template(), conversation, train_on) == expected


def test_control_tokens_that_are_typed_stay_text() -> None:
    sample = template().sample(chat(f"x{END}\n{SAYS}", f"y{END}"))
    start, end = 258, 259
    assert sample.tokens.tolist() == [
        start, *b"user\n", *f"x{END}\n{SAYS}".encode(), end, *b"\n",
        start, *b"assistant\n", *f"y{END}".encode(), end, *b"\n",
    ]  # fmt: skip
    assert int(sample.weights.sum()) == len(f"y{END}") + 1


def test_a_sample_may_be_cut_after_each_turn() -> None:
    sample = template().sample(chat("a", "bc", "d", "e"))
    # start + "user\n" + 1 + end; "\n" + start + "assistant\n" + 2 + end; "\n" + start + "user\n" + 1 + end; ...
    assert sample.turn_ends.tolist() == [8, 23, 32, 46, 47]


def test_private_characters_in_a_text_are_kept() -> None:
    text = "\U000f0000\U000f0001 <|im_end|>"
    sample = template().sample(chat(text, "b"))
    assert text.encode() in bytes(number for number in sample.tokens.tolist() if number < 256)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatml", "<|im_start|>system\ns <|im_end|>\n<|im_start|>user\n q<|im_end|>\n<|im_start|>assistant\n a "
                   "<|im_end|>\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n"),
        ("llama3", "<s><|start_header_id|>system<|end_header_id|>\n\ns<|eot_id|><|start_header_id|>user"
                   "<|end_header_id|>\n\nq<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\na<|eot_id|>"
                   "<|start_header_id|>user<|end_header_id|>\n\nr<|eot_id|><|start_header_id|>assistant"
                   "<|end_header_id|>\n\n"),
        ("llama4", "<s><|header_start|>system<|header_end|>\n\ns<|eot|><|header_start|>user<|header_end|>\n\n q<|eot|>"
                   "<|header_start|>assistant<|header_end|>\n\n a <|eot|><|header_start|>user<|header_end|>\n\nr"
                   "<|eot|><|header_start|>assistant<|header_end|>\n\n"),
        ("gemma", "<s><start_of_turn>user\ns \n\nq<end_of_turn>\n<start_of_turn>model\na<end_of_turn>\n"
                  "<start_of_turn>user\nr<end_of_turn>\n<start_of_turn>model\n"),
        ("mistral", "<s>[INST]  q[/INST] a</s>[INST] s \n\nr[/INST]"),
    ],
)  # fmt: skip
def test_our_templates_write_what_the_public_ones_do(name: str, expected: str) -> None:
    """The strings are those that the models' own templates make, written out by hand."""
    found = template(name)
    said = [("system", "s "), ("user", " q"), ("assistant", " a "), ("user", "r")]
    ids = found.prompt_ids([{"role": role, "content": content} for role, content in said])
    names = {number: token for token, number in found.tokenizer.control_tokens.items()}
    assert "".join(names.get(number) or chr(number) for number in ids) == expected


@pytest.mark.parametrize("name", OURS)
def test_ids_and_masks_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    found = open_template(name, opened(made_hf()), None, add_tokens=True)
    export = export_tokenizer(found.tokenizer, finds_control=True)
    for file, content in {**export.files, "chat_template.jinja": found.source.encode()}.items():
        (tmp_path / file).write_bytes(content)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for conversation in (chat("  hi é\n\n", " def f(x): ", "x", ""), chat("{{ a }}", "\n\nimport json\n")):
        messages = list(conversation.messages)
        made = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        sample = found.sample(conversation)
        assert sample.tokens.tolist() == made["input_ids"]
        assert (sample.weights > 0).tolist() == [bool(one) for one in made["assistant_masks"]]
        prompt = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
        assert found.prompt_ids(messages[:-1]) == prompt


@pytest.mark.parametrize("name", OURS)
def test_marks_find_the_same_answers_as_generation_blocks(name: str) -> None:
    blocks = template(name)
    source = blocks.source.replace("{%- generation %}", "{%- if true %}").replace("{% endgeneration %}", "{% endif %}")
    marks = ChatTemplate(source, "without blocks", blocks.tokenizer)
    for conversation in (chat("a", "b", "c", ""), chat(" a ", " b \n", "</s>", "c<|im_end|>")):
        one, other = blocks.sample(conversation), marks.sample(conversation)
        assert one.tokens.tolist() == other.tokens.tolist()
        np.testing.assert_array_equal(one.weights, other.weights)
        assert one.turn_ends.tolist() == other.turn_ends.tolist()


def test_a_template_that_drops_what_was_thought_earlier_works() -> None:
    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' %}{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
        "{% if loop.last and '</think>' in m.content %}"
        "{{ '<think>' + m.content.split('</think>')[0].split('<think>')[-1] + '</think>' + said }}"
        "{% else %}{{ said }}{% endif %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    found = ChatTemplate(source, "thinking", template().tokenizer)
    thought = "<think>hm</think>\nyes"
    assert shown(found, chat("a", thought, "b", thought)) == (
        f"{USER}a{END}\n{SAYS}{{yes{END}}}\n{USER}b{END}\n{SAYS}{{<think>hm</think>yes{END}}}\n"
    )


def test_calls_of_tools_train_and_their_results_do_not() -> None:
    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{{ m.content }}"
        "{% for call in m.tool_calls %}{{ call.function | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    found = ChatTemplate(source, "tools", template().tokenizer)
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": END}}}]}
    said = [{"role": "user", "content": "q"}, call, {"role": "tool", "content": "r"}]
    conversation = read_conversation({"messages": [*said, {"role": "assistant", "content": "a"}]})
    assert shown(found, conversation) == (
        f'{USER}q{END}\n{SAYS}{{{{"name": "f", "arguments": {{"a": "{END}"}}}}{END}}}\n'
        f"<|im_start|>tool\nr{END}\n{SAYS}{{a{END}}}\n"
    )


def test_a_completion_trains_what_follows_its_prompt_and_the_end_mark() -> None:
    sample = template().sample(Completion("a</s>", "bc"))
    assert sample.tokens.tolist() == [256, *b"a</s>bc", 257]
    assert sample.weights.tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }} {% endfor %}",
         "does not end with an end mark"),
        ("{% for m in messages %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% endfor %}",
         "generation blocks for"),
        ("{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
         "<|im_end|>{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}", "does not end with an end mark"),
        ("{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}<|im_start|>{{ m.content }}<|im_end|>"
         "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
         "{% if add_generation_prompt %}<|im_start|>{% endif %}", "are not the answers with their end marks"),
        ("{% for m in messages %}{{ m.content", "not a template that can be used"),
    ],
)  # fmt: skip
def test_a_template_whose_answers_are_not_clear_is_refused_by_name(source: str, reason: str) -> None:
    with pytest.raises(UserError, match=f"the chat template t.jinja.*{reason}"):
        ChatTemplate(source, "the chat template t.jinja", template().tokenizer)


def test_control_tokens_that_the_tokenizer_lacks_are_named_or_added(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"template chatml writes control tokens .* <\|im_start\|>, <\|im_end\|>"):
        open_template("chatml", ByteTokenizer())
    own = tmp_path / "own.jinja"
    own.write_text("{% for m in messages %}<|turn|>{{ m.content }}</s>{% endfor %}")
    with pytest.raises(UserError, match=r"own.jinja writes control tokens .* <\|turn\|>;"):
        open_template(str(own), ByteTokenizer())
    found = template().tokenizer
    assert (found.vocab_size, found.control_tokens["<|im_end|>"]) == (260, 259)
    again = load_tokenizer(TokenizerConfig.model_validate(found.save(tmp_path).model_dump(mode="json")), tmp_path)
    assert (again.fingerprint, again.control_tokens) == (found.fingerprint, found.control_tokens)
    assert found.fingerprint != ByteTokenizer().fingerprint


def test_the_template_beside_a_tokenizer_is_found(tmp_path: Path) -> None:
    source = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    (tmp_path / "tokenizer_config.json").write_text(
        '{"chat_template": [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]}'
    )
    with pytest.raises(UserError, match="tokenizer_config.json"):
        open_template("auto", ByteTokenizer(), tmp_path)
    (tmp_path / "chat_template.jinja").write_text(source)
    assert open_template("auto", ByteTokenizer(), tmp_path).source == source
    with pytest.raises(UserError, match="chat.template=auto: no chat template came with the tokenizer"):
        open_template("auto", ByteTokenizer(), tmp_path / "nowhere" / "tokenizer.json")
