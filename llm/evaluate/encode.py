"""Texts of tasks as ids of requests: where a context ends and what it is asked to be followed by begins.

A context and its continuation are encoded as one text, as a tokenizer may join letters of both; what the context has of
these ids is found by encoding it alone. What begins a text (BOS) stands there once and is never scored.

Source of the conventions: lm-eval 0.4.13 (`_encode_pair`, `get_rolling_token_windows`), but for left cuts, which keep
BOS here, and for continuations that share a token with their context, which lm-eval scores without that token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from llm.data.conversation import Message
from llm.errors import UserError
from llm.tokenizers.base import Tokenizer
from llm.tokenizers.chat import ChatTemplate
from llm.tokenizers.chat.encode import Span, checked

Window = tuple[tuple[int, ...], tuple[int, ...]]
"""Context, and the ids that are scored after it."""
KEPT = 64
"""Contexts whose ids are kept for their next continuation."""


@dataclass(frozen=True)
class Pair:
    """A context and what is scored after it, in ids."""

    context: tuple[int, ...]
    """at least one"""
    target: tuple[int, ...]
    """at least one"""
    truncated: bool = False
    """whether the context was cut on the left"""
    joint: bool = False
    """whether the target begins with tokens that hold some of the context"""


@dataclass(frozen=True)
class _Ids:
    """A text's ids."""

    begin: tuple[int, ...]
    """what begins it: put there by the tokenizer, or spelled"""
    rest: tuple[int, ...]


class Encoder:
    """The ids of a tokenizer, cut to a model's context."""

    def __init__(self, tokenizer: Tokenizer, context_length: int, reads_sources: bool = False) -> None:
        """reads_sources: the model is an encoder-decoder: what is asked is what its encoder reads."""
        self.tokenizer, self.context_length, self.reads_sources = tokenizer, context_length, reads_sources
        self._first = tuple(tokenizer.begin_ids) or (tokenizer.bos_id,)
        self._context_ids = lru_cache(KEPT)(self._ids)
        self._chat_context_ids = lru_cache(KEPT)(self._chat_ids)

    def pair(self, context: str, continuation: str) -> Pair:
        """A continuation after a context; "" as context is what begins a text. Blanks at the end of the context are
        scored with the continuation. UserError where there is nothing to score, or more than the model's context.
        """
        return self._pair(context, continuation, self._context_ids, self._ids)

    def answer(self, template: ChatTemplate, messages: Sequence[Message], continuation: str) -> Pair:
        """`pair`, the context being a conversation that the assistant answers with the continuation: the template alone
        says what begins it. What the continuation spells is text.
        """
        return self.rendered(template, *template.prompt_text(messages), continuation)

    def rendered(self, template: ChatTemplate, text: str, typed: Sequence[Span], continuation: str) -> Pair:
        """`answer`, the conversation being a text already, in which the template's control tokens are meant but for
        those at `typed`."""
        spans = tuple(typed)
        return self._pair(
            text,
            continuation,
            lambda part: self._chat_context_ids(template, part, spans, len(text)),
            lambda part: self._chat_ids(template, part, spans, len(text)),
        )

    def _chat_ids(self, template: ChatTemplate, part: str, typed: tuple[Span, ...], until: int) -> _Ids:
        """Ids of some of a conversation and its answer, which begins at character `until`."""
        inside = [span for span in typed if span[1] <= len(part)]
        said = [span for _, span in template.encoder.control_places(part, inside) if span[1] > until]
        return self._begun(template.encoder.encode(part, [*inside, *said]).tolist())

    def _pair(
        self, context: str, continuation: str, ids_of_context: Callable[[str], _Ids], ids: Callable[[str], _Ids]
    ) -> Pair:
        self._check_continues()
        before = context.rstrip()
        whole, alone = ids(context + continuation), ids_of_context(before)
        shared = _common(whole.rest, alone.rest)
        if shared == len(whole.rest):  # the continuation has no token of its own
            shared = max(0, shared - 1)
        target = whole.rest[shared:]
        if not target:
            raise UserError("nothing to score: the continuation has no tokens")
        if len(target) > self.context_length:
            raise UserError(
                f"a continuation of {len(target):,} tokens is longer than the model's context of "
                f"{self.context_length:,}"
            )
        found = (whole.begin + whole.rest[:shared]) or self._first
        kept = self._cut(found, len(whole.begin), self.context_length + 1 - len(target))
        return Pair(kept, target, truncated=len(kept) < len(found), joint=shared < len(alone.rest))

    def prompt(self, text: str, max_new_tokens: int) -> tuple[tuple[int, ...], bool]:
        """A text to continue, and whether it was cut on the left to leave room. UserError where there is none."""
        found = self._ids(text)
        return self.cut(found.begin + found.rest or self._first, max_new_tokens, len(found.begin))

    def source(self, text: str) -> tuple[tuple[int, ...], bool]:
        """What an encoder reads of a text, and whether it was cut on the left, after what begins it."""
        ids = tuple(self.tokenizer.source_ids(checked(text)))
        kept = self._cut(ids, len(self.tokenizer.begin_ids), self.context_length)
        return kept, len(kept) < len(ids)

    def _check_continues(self) -> None:
        if self.reads_sources:
            raise UserError(
                "the model is an encoder-decoder, which answers texts: kind generate alone can be asked of it"
            )

    def conversation(
        self, template: ChatTemplate, messages: Sequence[Message], max_new_tokens: int
    ) -> tuple[tuple[int, ...], bool]:
        """`prompt` of a conversation that the assistant is to answer."""
        found = self._begun(template.prompt_ids(messages))
        return self.cut(found.begin + found.rest, max_new_tokens, len(found.begin))

    def rendered_prompt(
        self, template: ChatTemplate, text: str, max_new_tokens: int
    ) -> tuple[tuple[int, ...], bool]:
        """`conversation`, the conversation being a text already, in which the template's control tokens are meant."""
        found = self._begun(template.encoder.encode(text, ()).tolist() or [self.tokenizer.bos_id])
        return self.cut(found.begin + found.rest, max_new_tokens, len(found.begin))

    def cut(self, ids: Sequence[int], max_new_tokens: int, n_begin: int) -> tuple[tuple[int, ...], bool]:
        """Ids that leave room for new ones, and whether they were cut on the left, after the first `n_begin`.
        UserError where there is no room."""
        room = self.context_length - max_new_tokens
        if room < 1:
            raise UserError(
                f"max_new_tokens={max_new_tokens} leaves no room for a prompt in the model's context of "
                f"{self.context_length:,}"
            )
        kept = self._cut(tuple(ids), n_begin, room)
        return kept, len(kept) < len(ids)

    def windows(self, text: str) -> list[Window]:
        """A text in windows of the model's context in which each of its tokens is scored once: the first begins as a
        text does, the others with the last token before them, the last with as many as fit. [] for "".
        """
        self._check_continues()
        found = self._ids(text)
        begin, rest = found.begin or self._first, found.rest
        size = self.context_length
        if size < len(begin):
            raise UserError(f"a context of {size} has no room for what begins a text, {len(begin)} tokens")
        done = min(len(rest), size + 1 - len(begin))
        windows: list[Window] = [(begin, rest[:done])] if rest else []
        while done < len(rest):
            end = min(len(rest), done + size)
            start = end - size - 1  # with it the context and all but the last scored token fill the window
            context = rest[start:done] if start >= 0 else begin[start:] + rest[:done]
            windows.append((context, rest[done:end]))
            done = end
        return windows

    @staticmethod
    def _cut(ids: tuple[int, ...], n_begin: int, room: int) -> tuple[int, ...]:
        """The last of the ids that fit, after the first `n_begin` of them."""
        if len(ids) <= room:
            return ids
        begin = ids[: min(n_begin, room)]
        left = room - len(begin)
        return begin + (ids[-left:] if left else ())

    def _ids(self, text: str) -> _Ids:
        begin, after = self.tokenizer.begin_ids, self.tokenizer.after_ids
        ids = self.tokenizer.prompt_ids(checked(text)) if text else [*begin]
        if text and after and tuple(ids[-len(after) :]) == after:
            ids = ids[: -len(after)]
        if begin and tuple(ids[: 2 * len(begin)]) == begin + begin:  # the text spells it too
            ids = ids[len(begin) :]
        return self._begun(ids)

    def _begun(self, ids: list[int]) -> _Ids:
        """Ids of which the first may begin a text."""
        n = len(self._first) if tuple(ids[: len(self._first)]) == self._first else 0
        return _Ids(tuple(ids[:n]), tuple(ids[n:]))


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids both begin with."""
    n = min(len(one), len(other))
    if one[:n] == other[:n]:
        return n
    return next((i for i in range(n) if one[i] != other[i]), n)
