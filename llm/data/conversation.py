"""Conversations, completions and preferences in the raw rows of files, in the spellings that are in use.

Which spelling a row has is seen by its columns: messages (`messages: [{role, content}]`), ShareGPT (`conversations:
[{from, value}]`), Alpaca (`instruction`, `input`, `output`), `prompt` and `completion`, or `prompt`, `chosen` and
`rejected`. All become the messages that chat templates are written for. Errors say what is wrong with the row; whoever
reads the file says which file and row it is.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llm.data.image_source import ImageSource, source_of
from llm.data.json_rows import called
from llm.errors import UserError

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool", "ipython")
SHAREGPT_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool", "function_response": "tool"
}  # fmt: skip
CALL = "function_call"
"""ShareGPT's role of the turn in which the assistant calls a tool: its value is the call in JSON."""
PLACEHOLDER = "<image>"
"""Where an image stands in what is said, in rows that have a column of images."""
IMAGE_PARTS = ("image", "image_url")
"""Types of parts that are images."""
IMAGE_FROM = ("image", "image_url", "path", "url", "bytes", "value")
"""Keys of such a part under which the image, or its path, stands; a part without takes the next of the column."""
SOURCE = "source"
"""Where a part keeps the image while a row is read."""
THINKING = ("reasoning_content", "thinking", "reasoning")
"""Keys of a message under which its reasoning stands; templates read the first."""


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates take them, and what is said about training on them."""

    messages: tuple[Message, ...]
    """Each with `role` and, unless it only calls tools, `content`: a text, or with images a list of parts {type: text,
    text} and {type: image}."""
    weights: tuple[float | None, ...]
    """Of each message: the factor of its targets' loss; None where the row says nothing, which is 1."""
    tools: tuple[dict[str, Any], ...] = ()
    """Schemas of the functions that the assistant may call."""
    images: tuple[ImageSource, ...] = ()
    """Where the images are, in the order of their parts."""


@dataclass(frozen=True)
class Completion:
    """A text and what follows it."""

    prompt: str
    completion: str


Trained = Conversation | Completion


@dataclass(frozen=True)
class Preference:
    """Two answers to the same prompt, the better one first."""

    chosen: Trained
    rejected: Trained


class _Fields:
    """A row by our names of its columns."""

    def __init__(self, row: Mapping[str, Any], columns: Mapping[str, str]) -> None:
        self.row, self.columns = row, columns
        missing = [f"{ours}: {theirs}" for ours, theirs in columns.items() if theirs not in row]
        if missing:
            raise UserError(f"has no column for {', '.join(missing)} (columns); it has {_names(row)}")

    def name(self, field: str) -> str:
        return self.columns.get(field, field)

    def has(self, field: str) -> bool:
        return self.row.get(self.name(field)) is not None

    def get(self, field: str) -> Any:
        return self.row.get(self.name(field))

    def text(self, field: str) -> str:
        value = self.get(field)
        if not isinstance(value, str):
            raise UserError(f"its {self.name(field)} is {called(value)}, not a text")
        return value

    def refuse(self, wanted: str) -> UserError:
        return UserError(f"has no {wanted} (see columns); its columns are {_names(self.row)}")


def read_conversation(row: Mapping[str, Any], columns: Mapping[str, str] | None = None) -> Conversation:
    """The conversation of a row of kind chat. columns: our names of columns to the file's.

    Images are parts of a content in parts, or stand in the column images (or image) and where `<image>` is said. In a
    row that has neither, `<image>` is text like any other; so it is in a row whose contents have parts of images.
    """
    fields = _Fields(row, columns or {})
    if fields.has("messages"):
        messages, where = fields.get("messages"), fields.name("messages")
    elif fields.has("conversations"):
        messages, where = fields.get("conversations"), fields.name("conversations")
    elif fields.has("instruction") and fields.has("output"):
        messages, where = None, ""
    else:
        raise fields.refuse("messages, conversations, or instruction and output")
    found = _alpaca(fields) if messages is None else _messages(messages, where)
    if fields.has("system") and fields.text("system") and found.messages[0]["role"] != "system":
        found = _joined(_said("system", fields.text("system")), found)
    return _with_images(replace(found, tools=_tools(fields)), fields)


def read_completion(row: Mapping[str, Any], columns: Mapping[str, str] | None = None) -> Trained:
    """The prompt and completion of a row: two texts, or messages of which those of the completion train."""
    fields = _Fields(row, columns or {})
    _refuse_images(fields, "completion")
    if not fields.has("prompt") or not fields.has("completion"):
        raise fields.refuse("prompt and completion")
    return _without_images(_with_tools(_answered(fields, "prompt", "completion"), fields), "completion")


def read_preference(row: Mapping[str, Any], columns: Mapping[str, str] | None = None) -> Preference:
    """The two answers of a row of kind preference. Without a prompt, chosen and rejected are whole conversations, and
    what they begin with alike is the prompt."""
    fields = _Fields(row, columns or {})
    _refuse_images(fields, "preference")
    if not fields.has("chosen") or not fields.has("rejected"):
        raise fields.refuse("chosen and rejected")
    if fields.has("prompt"):
        chosen, rejected = (_answered(fields, "prompt", name) for name in ("chosen", "rejected"))
    else:
        chosen, rejected = _without_prompt(fields)
    chosen, rejected = (_without_images(_with_tools(found, fields), "preference") for found in (chosen, rejected))
    return Preference(chosen, rejected)


def _answered(fields: _Fields, prompt: str, answer: str) -> Trained:
    first, second = fields.get(prompt), fields.get(answer)
    if isinstance(first, str) and isinstance(second, str):
        return Completion(first, second)
    before = _said("user", first) if isinstance(first, str) else _messages(first, fields.name(prompt))
    after = _said("assistant", second) if isinstance(second, str) else _messages(second, fields.name(answer))
    return _joined(_untrained(before), after)


def _without_prompt(fields: _Fields) -> tuple[Trained, Trained]:
    first, second = fields.get("chosen"), fields.get("rejected")
    if isinstance(first, str) or isinstance(second, str):
        raise fields.refuse("prompt, which chosen and rejected as texts need")
    chosen, rejected = _messages(first, fields.name("chosen")), _messages(second, fields.name("rejected"))
    pairs = zip(chosen.messages, rejected.messages, strict=False)
    alike = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(chosen.messages), len(rejected.messages)))

    def cut(whole: Conversation) -> Conversation:
        begin = Conversation(whole.messages[:alike], whole.weights[:alike])
        return _joined(_untrained(begin), Conversation(whole.messages[alike:], whole.weights[alike:]))

    if alike == len(chosen.messages) or alike == len(rejected.messages):
        raise UserError(f"its {fields.name('chosen')} and {fields.name('rejected')} do not differ in an answer")
    return cut(chosen), cut(rejected)


def _untrained(found: Conversation) -> Conversation:
    return replace(found, weights=(0.0,) * len(found.messages))


def _joined(*parts: Conversation) -> Conversation:
    return Conversation(tuple(m for p in parts for m in p.messages), tuple(w for p in parts for w in p.weights))


def _said(role: str, text: str) -> Conversation:
    return Conversation(({"role": role, "content": text},), (None,))


def _alpaca(fields: _Fields) -> Conversation:
    parts = []
    history = fields.get("history") or []
    for number, pair in enumerate(_listed(history, fields.name("history")), 1):
        if not isinstance(pair, Sequence) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise UserError(f"entry {number} of its {fields.name('history')} is not a question and an answer")
        parts += [_said("user", pair[0]), _said("assistant", pair[1])]
    question = fields.text("instruction")
    if fields.has("input") and fields.text("input"):
        question = f"{question}\n\n{fields.text('input')}"
    return _joined(*parts, _said("user", question), _said("assistant", fields.text("output")))


def _messages(value: Any, where: str) -> Conversation:
    """The messages in a list, of either spelling."""
    messages, weights = [], []
    for number, item in enumerate(_listed(value, where), 1):
        name = f"message {number} of its {where}"
        if not isinstance(item, Mapping):
            raise UserError(f"{name} is {called(item)}, where an object with role and content must be")
        messages.append(_message(item, name))
        weights.append(_weight(item, name))
    if not messages:
        raise UserError(f"its {where} is empty")
    return Conversation(tuple(messages), tuple(weights))


def _listed(value: Any, where: str) -> list[Any]:
    value = _parsed(value, f"its {where}") if isinstance(value, str) else value
    if not isinstance(value, list):
        raise UserError(f"its {where} is {called(value)}, not a list")
    return value


def _parsed(text: str, what: str) -> Any:
    """A value that files without lists keep as JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{what} is a text that is no JSON") from None


def _message(item: Mapping[str, Any], name: str) -> Message:
    role_key = "role" if "role" in item else "from"
    role = item.get(role_key)
    if not isinstance(role, str):
        raise UserError(f"{name} has no role" if role is None else f"{name}: its {role_key} is {called(role)}")
    if role not in (*ROLES, *SHAREGPT_ROLES, CALL):
        raise UserError(f"{name}: unknown role {role!r}; known are {', '.join((*ROLES, *SHAREGPT_ROLES, CALL))}")
    own = ("role", "from", "content", "train", "loss_weight", *(("value",) if "content" not in item else ()))
    message: Message = {"role": SHAREGPT_ROLES.get(role, role)}
    content = item.get("content", item.get("value"))
    if role == CALL:
        message = {"role": "assistant", "content": "", "tool_calls": _calls(content, name)}
    elif isinstance(content, list):
        message |= _from_parts(content, name)
    elif isinstance(content, str):
        message["content"] = content
    elif content is not None:
        raise UserError(f"{name}: its content is {called(content)}, neither a text nor a list of parts")
    message |= {key: plain(value) for key, value in item.items() if key not in own and value is not None}
    if "content" not in message and not message.get("tool_calls"):
        raise UserError(f"{name} has no content")
    thinking = next((message[key] for key in THINKING if key in message), None)
    if thinking is not None:
        message = {"thinking": thinking, **message, "reasoning_content": thinking}
    return message


def _from_parts(parts: list[Any], name: str) -> Message:
    """Content in parts: the texts follow one another, as one text unless images stand between them; what was thought
    and which tools are called stand beside.
    """
    said: list[dict[str, Any]] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for number, part in enumerate(parts, 1):
        what = f"{name}, part {number}"
        if not isinstance(part, Mapping):
            raise UserError(f"{what} is {called(part)}, where an object with type and text must be")
        kind = part.get("type")
        given = next((part[key] for key in (str(kind), "text", "value") if part.get(key) is not None), None)
        if kind in ("video", "audio"):
            raise UserError(f"{what} is of type {kind}, which no model here can read")
        if kind not in ("text", "thinking", "reasoning", "tool_call", *IMAGE_PARTS):
            raise UserError(f"{what}: unknown type {kind!r}; known are text, image, thinking, reasoning, tool_call")
        if kind in IMAGE_PARTS:
            place = next((part[key] for key in IMAGE_FROM if part.get(key) is not None), None)
            said.append({"type": "image", SOURCE: None if place is None else source_of(place, what)})
        elif kind == "tool_call":
            calls += _calls(given, what)
        elif not isinstance(given, str):
            raise UserError(f"{what} has no text")
        elif kind == "text" and said and said[-1]["type"] == "text":
            said[-1] = _text_part(said[-1]["text"] + given)
        elif kind == "text":
            said.append(_text_part(given))
        else:
            thoughts.append(given)
    has_images = any(part["type"] == "image" for part in said)
    return {
        "content": said if has_images else "".join(part["text"] for part in said),
        **({"reasoning_content": "".join(thoughts)} if thoughts else {}),
        **({"tool_calls": calls} if calls else {}),
    }


def _calls(value: Any, name: str) -> list[dict[str, Any]]:
    """Calls of tools, one or several, as templates take them."""
    value = _parsed(value, f"{name}: the call of a tool") if isinstance(value, str) else value
    found = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise UserError(f"{name}: the call of a tool is not an object with name and arguments")
        found.append({"type": "function", "function": plain(function)})
    return found


def _weight(item: Mapping[str, Any], name: str) -> float | None:
    train, weight = item.get("train"), item.get("loss_weight")
    if train is not None and not isinstance(train, bool):
        raise UserError(f"{name}: its train is {called(train)}, neither true nor false")
    if weight is not None:
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight) or weight < 0:
            raise UserError(f"{name}: its loss_weight must be a number from 0 (got {weight!r})")
        return 0.0 if train is False else float(weight)
    return None if train is None else float(train)


def _with_tools(found: Trained, fields: _Fields) -> Trained:
    return found if isinstance(found, Completion) else replace(found, tools=_tools(fields))


def _tools(fields: _Fields) -> tuple[dict[str, Any], ...]:
    if not fields.has("tools") or fields.get("tools") == "":
        return ()
    tools = _listed(fields.get("tools"), fields.name("tools"))
    for number, tool in enumerate(tools, 1):
        if not isinstance(tool, Mapping):
            raise UserError(f"tool {number} of its {fields.name('tools')} is {called(tool)}, not a function's schema")
    return tuple(plain(tool) for tool in tools)


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _column_images(fields: _Fields) -> list[ImageSource]:
    """The images of a row that stand in a column of their own."""
    for field in ("images", "image"):
        given = fields.get(field)
        if given is None or given in ("", []):
            continue
        if field == "image" and not isinstance(given, list):
            return [source_of(given, f"its {fields.name(field)}")]
        if isinstance(given, str) and not given.lstrip().startswith("["):  # of a file without lists
            return [source_of(given, f"its {fields.name(field)}")]
        entries = _listed(given, fields.name(field))
        return [source_of(entry, f"entry {i} of its {fields.name(field)}") for i, entry in enumerate(entries, 1)]
    return []


def _with_images(found: Conversation, fields: _Fields) -> Conversation:
    """The conversation with its images in their places. UserError where there are more or fewer places than images."""
    given = _column_images(fields)
    messages = found.messages
    if given and not any(_image_parts(message) for message in messages):
        messages = tuple(_at_placeholders(message) for message in messages)
    places = [part for message in messages for part in _image_parts(message)]
    bare = sum(part.get(SOURCE) is None for part in places)
    if bare != len(given):
        what = "part of an image that names none" if any(SOURCE in part for part in places) else PLACEHOLDER
        raise UserError(f"has {len(given)} image{'' if len(given) == 1 else 's'} in its columns, and {bare} x {what}")
    from_column = iter(given)
    images = tuple(next(from_column) if part.get(SOURCE) is None else part[SOURCE] for part in places)
    return replace(found, messages=tuple(map(_without_sources, messages)), images=images)


def _image_parts(message: Message) -> list[dict[str, Any]]:
    content = message.get("content")
    return [part for part in content if part["type"] == "image"] if isinstance(content, list) else []


def _at_placeholders(message: Message) -> Message:
    """The message with parts of images where its text has placeholders."""
    content = message.get("content")
    if not isinstance(content, str) or PLACEHOLDER not in content:
        return message
    parts: list[dict[str, Any]] = []
    for number, text in enumerate(content.split(PLACEHOLDER)):
        parts += [{"type": "image"}] if number else []
        parts += [_text_part(text)] if text else []
    return {**message, "content": parts}


def _without_sources(message: Message) -> Message:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": [{key: part[key] for key in part if key != SOURCE} for part in content]}


def _refuse_images(fields: _Fields, kind: str) -> None:
    """UserError for a row with a column of images; in one without, <image> is text like any other."""
    if _column_images(fields):
        raise UserError(f"has images, which rows of kind {kind} cannot; those of kind chat and image_text can")


def _without_images(found: Trained, kind: str) -> Trained:
    if isinstance(found, Conversation) and any(_image_parts(message) for message in found.messages):
        raise UserError(f"has images, which rows of kind {kind} cannot; those of kind chat and image_text can")
    return found


def plain(value: Any) -> Any:
    """The value in plain types of JSON, its entries without a value left out, as columns of nested rows have them."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, list(row)[:20])) or "none"
