"""A chat template with its tokenizer: conversations as samples to train on, and as prompts.

What of a conversation is trained is found in the rendered text: by the template's `{% generation %}` blocks where it
has them, else by marks in what is said. A turn of the assistant begins where the prompt for it ends and ends with its
end mark. Tokens are never found by encoding a conversation piece by piece: text is merged across the pieces.

Shapes: n tokens of a sample.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from llm.data.conversation import Completion, Conversation, Message, Trained
from llm.data.sample import Sample
from llm.errors import UserError
from llm.tokenizers.base import ENDS_A_TURN, Tokenizer
from llm.tokenizers.chat.encode import ChatEncoder, Span, checked
from llm.tokenizers.chat.render import Renderer, strings, taken_out, unused
from llm.tokenizers.extended import ExtendedTokenizer
from llm.tokenizers.folder import FolderTokenizer

TrainOn = Literal["assistant", "last", "all"]

VERSION = 1  # raise it when the same template, tokenizer and conversation would give another sample
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
MORE_ENDS = ("<|endoftext|>", "<|end_of_text|>", "<|END_OF_TURN_TOKEN|>", "<|return|>", "<|call|>")
"""Marks that end a turn, beside ENDS_A_TURN and those that end a generation."""
IMAGE = "<|image|>"
"""The control token that an image is in a rendered text; what somebody typed stays text."""
OPENS, CLOSES, BEGINS, ENDS = range(4)
"""Which mark stands for what: around a typed control token; around a generation block."""
PROBES: tuple[tuple[Message, ...], ...] = tuple(
    tuple({"role": role, "content": f"{role[0]}{i}"} for i, role in enumerate(roles))
    for roles in (("user", "assistant", "user", "assistant"), ("system", "user", "assistant"))
)
"""Conversations on which a template is tried when it is opened."""


@dataclass(frozen=True)
class _Turn:
    """A turn of the assistant: its message, and its characters, end mark included."""

    message: int
    span: Span


@dataclass(frozen=True)
class _Rendered:
    """A rendered conversation."""

    text: str
    typed: list[Span]
    """Control tokens that are text, as somebody typed them."""
    turns: list[_Turn]
    message_ends: dict[int, int]
    """Place after the end mark of each message that has one."""


class ChatTemplate:
    """`source`: its Jinja text. `end_ids`: what ends an answer."""

    def __init__(self, source: str, name: str, tokenizer: Tokenizer) -> None:
        """`name` is used in messages. UserError naming the template where it cannot be used with the tokenizer."""
        self.source, self.name, self.tokenizer = source, name, tokenizer
        self.encoder = ChatEncoder(tokenizer)
        marks = names_of_marks(tokenizer)
        self._renderer = Renderer(source, name, marks)
        content = "\0".join([str(VERSION), source, *(f"{key}={value}" for key, value in sorted(marks.items()))])
        self.fingerprint = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
        name_of = {number: token for token, number in self.encoder.controls.items()}
        ends = {*ENDS_A_TURN, *MORE_ENDS, *(name_of.get(number, "") for number in tokenizer.end_ids)}
        self._end_names = ends & self.encoder.controls.keys()
        self._has_blocks = GENERATION.search(source) is not None
        self._header = self._found_header()
        self.end_ids = self._probed()

    def sample(self, found: Trained, train_on: TrainOn = "assistant") -> Sample:
        """The sample of a conversation, or of a completion, which has no template: one token, IMAGE, for each image.
        UserError saying what is wrong.
        """
        if isinstance(found, Completion):
            return completion_sample(found, self.encoder)
        rendered = self._rendered(found)
        ids = self.encoder.encode(rendered.text, rendered.typed)
        starts, ends = self.encoder.spans(rendered.text, ids, rendered.typed)
        bytes_at = _Bytes(rendered.text)
        weights = np.zeros(len(ids), dtype=np.float32)
        if train_on == "all":
            weights[:] = 1
            self._weigh_messages(weights, starts, found, rendered, bytes_at)
        else:
            for turn in rendered.turns if train_on == "assistant" else rendered.turns[-1:]:
                begin, end = map(bytes_at, turn.span)
                given = found.weights[turn.message]
                weights[(starts < end) & (ends > begin)] = 1 if given is None else given
        weights[:1] = 0
        cuts = {int(np.searchsorted(ends, bytes_at(place), side="right")) for place in rendered.message_ends.values()}
        return Sample(ids, weights, np.array(sorted({*cuts, len(ids)} - {0}), dtype=np.int64))

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Ids of a conversation up to where the assistant's next turn begins: one, IMAGE, for each image."""
        text, typed = self._prompt(messages, tools)
        ids: list[int] = self.encoder.encode(text, typed).tolist()
        return ids or [self.tokenizer.bos_id]

    def prompt_text(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), generation: bool = True
    ) -> tuple[str, list[Span]]:
        """The text whose ids `prompt_ids` gives, and where it spells control tokens that are none. generation: whether
        what begins the assistant's answer stands at its end."""
        return self._prompt(messages, tools, generation)

    def _prompt(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], generation: bool = True
    ) -> tuple[str, list[Span]]:
        marks = unused([self.source, *strings(messages), *strings(tools)], 2)
        asked, schemas = self._wrapped((list(messages), list(tools)), marks)
        asked = [in_one_text(message) for message in asked]
        return self._without_marks(self._renderer.render(asked, schemas, generation), marks)[:2]

    def _wrapped(self, value: Any, marks: Sequence[str]) -> Any:
        """The value with marks around the control tokens that its texts spell."""
        if not any(self.encoder.spelled(text) for text in strings(value)):
            return value
        if isinstance(value, str):
            return self.encoder.wrapped(value, marks[OPENS], marks[CLOSES])
        if isinstance(value, Mapping):
            return {key: self._wrapped(item, marks) for key, item in value.items()}
        return [self._wrapped(item, marks) for item in value]

    def _without_marks(self, text: str, marks: Sequence[str]) -> tuple[str, list[Span], list[tuple[int, int]]]:
        """The text, the control tokens typed in it, and (place, number of the mark) of the other marks."""
        text, found = taken_out(text, "".join(marks))
        places = [(place, marks.index(mark)) for place, mark in found]
        around = zip(places, places[1:], strict=False)
        typed = [
            (a, b) for (a, i), (b, j) in around if (i, j) == (OPENS, CLOSES) and text[a:b] in self.encoder.controls
        ]
        return text, typed, [place for place in places if place[1] not in (OPENS, CLOSES)]

    def _rendered(self, found: Conversation) -> _Rendered:
        n = len(found.messages)
        marks = unused([self.source, *strings(found.messages), *strings(found.tools)], 4 + n)
        messages, tools = self._wrapped((list(found.messages), list(found.tools)), marks)
        messages = [in_one_text(message) for message in messages]
        around = (marks[BEGINS], marks[ENDS]) if self._has_blocks else ("", "")
        text, typed, blocks = self._without_marks(self._renderer.render(messages, tools, False, around), marks)
        checked(text)
        said = self._places(messages, tools, text, marks)
        ends = [span for name, span in self.encoder.control_places(text, typed) if name in self._end_names]
        assistants = [i for i, message in enumerate(found.messages) if message["role"] == "assistant"]
        if self._has_blocks:
            turns = self._by_blocks(blocks, assistants, ends)
        else:
            turns = [self._by_marks(i, found, text, said, ends) for i in assistants]
        message_ends = {turn.message: turn.span[1] for turn in turns}
        for i, place in said.items():
            if i not in message_ends and (end := _end_after(place, _next(said, place, len(text)), ends)) is not None:
                message_ends[i] = end
        return _Rendered(text, typed, turns, message_ends)

    def _places(self, messages: list[Message], tools: list[Any], text: str, marks: Sequence[str]) -> dict[int, int]:
        """Where in the text the content of each message begins; of those of which a mark shows it. A template may look
        at the beginning of what is said, so that a mark there changes what it renders: then only the assistant's
        messages get one."""
        for roles in (None, "assistant"):
            marked = [
                _marked(message, marks[4 + i]) if roles in (None, message["role"]) else message
                for i, message in enumerate(messages)
            ]
            try:
                found, _, places = self._without_marks(self._renderer.render(marked, tools), marks)
            except UserError:  # a template that looks at what is said
                continue
            if found == text:
                return {number - 4: place for place, number in reversed(places)}
        return {}

    def _by_blocks(self, blocks: list[tuple[int, int]], assistants: list[int], ends: list[Span]) -> list[_Turn]:
        spans = [(a, b) for (a, i), (b, j) in zip(blocks, blocks[1:], strict=False) if (i, j) == (BEGINS, ENDS)]
        if len(spans) != len(assistants):
            raise UserError(
                f"{self.name} renders {len(spans)} generation blocks for {len(assistants)} turns of the assistant"
            )
        for place, (_, end) in enumerate(spans, 1):
            if all(end != other for _, other in ends):
                raise UserError(f"{self.name}: its generation block of answer {place} does not end with an end mark")
        return [_Turn(message, span) for message, span in zip(assistants, spans, strict=True)]

    def _by_marks(self, message: int, found: Conversation, text: str, said: dict[int, int], ends: list[Span]) -> _Turn:
        place = said.get(message)
        start = self._start(message, found, text, place)
        if start is None:
            raise UserError(f"{self.name}: where answer {message + 1} begins cannot be seen in what it renders")
        end = _end_after(start, _next(said, start if place is None else place, len(text)), ends)
        if end is None:
            raise UserError(f"{self.name}: message {message + 1}, an answer, does not end with an end mark")
        return _Turn(message, (start, end))

    def _start(self, number: int, found: Conversation, text: str, place: int | None) -> int | None:
        """Where an answer begins: where the prompt for it ends, or else where its content begins."""
        message = in_one_text(found.messages[number])
        blanks = ""
        if place is not None:
            content = message["content"]
            blanks = content[: len(content) - len(content.lstrip())]
            blanks = blanks if text[:place].endswith(blanks) else ""
            plain = message.keys() <= {"role", "content"} and "</" not in content
            if plain and self._header and text[: place - len(blanks)].endswith(self._header):
                return place - len(blanks)
        try:
            prompt = self._prompt(found.messages[:number], found.tools)[0] if number else ""
        except UserError:  # a template that wants an answer, or a question, there
            prompt = ""
        if prompt and text.startswith(prompt) and (place is None or len(prompt) <= place):
            return len(prompt)
        return None if place is None else place - len(blanks)

    def _found_header(self) -> str:
        """What the template writes before an answer, where its content follows at once; "" where it does not."""
        messages = PROBES[0][:2]
        try:
            before, prompt = (self._prompt(messages[:1], (), generation)[0] for generation in (False, True))
            whole = self._renderer.render(list(messages))
        except UserError:
            return ""
        follows = prompt.startswith(before) and whole.startswith(prompt + messages[1]["content"])
        return prompt[len(before) :] if follows else ""

    def _weigh_messages(
        self,
        weights: NDArray[np.float32],
        starts: NDArray[np.int64],
        found: Conversation,
        rendered: _Rendered,
        bytes_at: "_Bytes",
    ) -> None:
        """Multiply the weights of all tokens by those of their messages; each begins where the one before ended."""
        begin = 0
        of_turn = {turn.message: turn.span for turn in rendered.turns}
        for i, given in enumerate(found.weights):
            following = of_turn.get(i + 1, (len(rendered.text), 0))[0]
            end = rendered.message_ends.get(i, following)
            if given is not None:
                weights[(starts >= bytes_at(begin)) & (starts < bytes_at(end))] *= given
            begin = max(begin, end)

    def _probed(self) -> tuple[int, ...]:
        """Ids that end an answer. UserError where the template's blocks and marks differ about what an answer is."""
        found = [*self.tokenizer.end_ids]
        for messages in PROBES:
            conversation = Conversation(messages, (None,) * len(messages))
            try:
                self._renderer.render(list(messages))
            except UserError:  # not every template takes every conversation
                continue
            ids = self.sample(conversation)
            trained = np.flatnonzero(ids.weights)
            found.append(int(ids.tokens[trained[-1]]))
            if self._has_blocks:
                self._has_blocks = False
                try:
                    by_marks = self.sample(conversation)
                finally:
                    self._has_blocks = True
                if not np.array_equal(ids.weights, by_marks.weights):
                    raise UserError(f"{self.name}: its generation blocks are not the answers with their end marks")
        return tuple(dict.fromkeys(found))


class _Bytes:
    """Bytes of a text before one of its characters."""

    def __init__(self, text: str) -> None:
        self._text, self._ascii = text, text.isascii()

    def __call__(self, place: int) -> int:
        return place if self._ascii else len(self._text[:place].encode())


def completion_sample(found: Completion, encoder: ChatEncoder) -> Sample:
    """Prompt, completion and end mark, as texts; the prompt is not trained."""
    tokenizer, text = encoder.tokenizer, checked(found.prompt + found.completion)
    inner = np.asarray(tokenizer.encode(text), dtype=np.int64)
    _, ends = encoder.spans(text, inner)
    trained = ends > len(found.prompt.encode())
    begin = list(tokenizer.begin_ids)
    weights = np.array([*[0] * len(begin), *trained, 1], dtype=np.float32)
    weights[:1] = 0
    ids = np.array([*begin, *inner, tokenizer.eos_id], dtype=np.int64)
    return Sample(ids, weights, np.array([len(ids)], dtype=np.int64))


def names_of_marks(tokenizer: Tokenizer) -> dict[str, str]:
    """Names of special tokens by the names that templates have for them (bos_token, ...)."""
    inner = tokenizer.inner if isinstance(tokenizer, ExtendedTokenizer) else tokenizer
    if isinstance(inner, FolderTokenizer) and inner.marks:
        return dict(inner.marks)
    name_of = {number: name for name, number in tokenizer.control_tokens.items()}
    return {key: name_of[i] for key, i in (("bos_token", inner.bos_id), ("eos_token", inner.eos_id)) if i in name_of}


def in_one_text(message: Message) -> Message:
    """The message as templates take it: a content in parts as one text, with IMAGE where images stand."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": "".join(IMAGE if part["type"] == "image" else part["text"] for part in content)}


def _marked(message: Message, mark: str) -> Message:
    """The message with a mark where its content begins, after blanks, which a template may strip."""
    content = message.get("content", "")
    begin = len(content) - len(content.lstrip())
    return message if begin == len(content) else {**message, "content": content[:begin] + mark + content[begin:]}


def _next(said: dict[int, int], place: int, end: int) -> int:
    """Where the content of the next message begins."""
    return min((other for other in said.values() if other > place), default=end)


def _end_after(start: int, limit: int, ends: list[Span]) -> int | None:
    """Where the first end mark after `start` ends, if that is before `limit`."""
    return next((end for begin, end in ends if begin >= start and end <= limit), None)
