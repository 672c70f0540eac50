"""Where the answer to a Continue ends: at an end mark, before a stop text whichever tokens it is written in, at its
number of tokens, or where the model's context does.
"""

from collections.abc import Sequence

from llm.generation.stops import StopTexts
from llm.generation.text import TextStream, continuation
from llm.tokenizers.base import Tokenizer


class AnswerText:
    """The text of a growing answer, looked through for stop texts as it grows."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]) -> None:
        """stop: none of them empty."""
        self._tokenizer, self._prompt = tokenizer, prompt
        self._ids: list[int] = []
        self._stream = TextStream(tokenizer, prompt) if stop else None
        self._stops = StopTexts(stop)
        self._parts: list[str] = []

    @property
    def stopped(self) -> bool:
        """Whether a stop text stands in it."""
        return self._stops.stopped

    def push(self, token: int) -> None:
        """Add a token that is no end mark."""
        if self._stream is None:
            self._ids.append(token)
        elif not self.stopped:
            self._parts.append(self._stops.push(self._stream.push(token)))

    def end(self) -> str:
        """The whole text up to the first stop text, once no token is to come. A character cut in the middle is U+FFFD.
        """
        if self._stream is None:
            return continuation(self._tokenizer, self._prompt, self._ids)
        if not self.stopped:
            self._parts += [self._stops.push(self._stream.end()), self._stops.end()]
        return "".join(self._parts)
