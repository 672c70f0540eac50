"""Where the answer to a Continue ends: at an end mark, before a stop text whichever tokens it is written in, at its
number of tokens, or where the model's context does.
"""

from collections.abc import Sequence

from llm.generation.text import TextStream, continuation
from llm.tokenizers.base import Tokenizer


class AnswerText:
    """The text of a growing answer, looked through for stop texts as it grows."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]) -> None:
        """stop: none of them empty."""
        self._tokenizer, self._prompt, self._stop = tokenizer, prompt, stop
        self._ids: list[int] = []
        self._stream = TextStream(tokenizer, prompt) if stop else None
        self._longest = max(map(len, stop), default=0)
        self._text = ""
        self.stopped = False
        """Whether a stop text stands in it."""

    def push(self, token: int) -> None:
        """Add a token that is no end mark."""
        if self._stream is None:
            self._ids.append(token)
        elif not self.stopped:
            self._add(self._stream.push(token))

    def end(self) -> str:
        """The whole text up to the first stop text, once no token is to come. A character cut in the middle is U+FFFD.
        """
        if self._stream is None:
            return continuation(self._tokenizer, self._prompt, self._ids)
        if not self.stopped:
            self._add(self._stream.end())
        return self._text

    def _add(self, part: str) -> None:
        if not part:
            return
        seen = max(0, len(self._text) - self._longest + 1)  # a stop text may begin in what was there
        self._text += part
        found = [place for place in (self._text.find(text, seen) for text in self._stop) if place >= 0]
        if found:
            self._text, self.stopped = self._text[: min(found)], True
