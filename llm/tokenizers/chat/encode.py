"""A rendered conversation as ids: control tokens where the template put them, text between them in one piece.

A control token that somebody only typed is text. Where nobody typed any, a foreign tokenizer's own library encodes the
whole text, as `transformers` does.
"""

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llm.errors import UserError
from llm.tokenizers.base import Tokenizer

Span = tuple[int, int]
"""Characters from, to."""


class ChatEncoder:
    """Encodes what templates render."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.controls = dict(tokenizer.control_tokens)
        """Ids of control tokens by name."""
        names = sorted(self.controls, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._bytes = tokenizer.token_bytes().astype(np.int64)
        for name, number in self.controls.items():
            self._bytes[number] = len(name.encode())

    def spelled(self, text: str) -> bool:
        """Whether a text has the name of a control token in it."""
        return self._pattern.search(text) is not None

    def wrapped(self, text: str, opens: str, closes: str) -> str:
        """The text with marks around every name of a control token."""
        return self._pattern.sub(lambda found: f"{opens}{found.group()}{closes}", text)

    def encode(self, text: str, typed: Sequence[Span] = ()) -> NDArray[np.int64]:
        """Ids of a text. typed: where it spells control tokens that are none. UserError where it cannot be written."""
        ids = None if typed else self.tokenizer.rendered_ids(checked(text))
        return np.asarray(self._in_parts(checked(text), typed) if ids is None else ids, dtype=np.int64)

    def _in_parts(self, text: str, typed: Sequence[Span]) -> list[int]:
        ids: list[int] = []
        begin = 0
        for name, (start, end) in [*self.control_places(text, typed), ("", (len(text), len(text)))]:
            if part := text[begin:start]:
                ids += self.tokenizer.encode_inside(part) if begin else self.tokenizer.encode(part)
            if name:
                ids.append(self.controls[name])
            begin = end
        return ids

    def control_places(self, text: str, typed: Sequence[Span] = ()) -> list[tuple[str, Span]]:
        """Names and places of the control tokens in a text that are not typed."""
        places, at, left = [], 0, list(typed)
        while found := self._pattern.search(text, at):
            while left and left[0][1] <= found.start():
                left.pop(0)
            if left and left[0][0] < found.end():  # what was typed reaches into it
                at = found.start() + 1
            else:
                places.append((found.group(), found.span()))
                at = found.end()
        return places

    def spans(self, text: str, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The bytes of the text, from and to, that each id stands for. UserError where the tokenizer changed the text,
        so that nobody can tell."""
        sizes = self._bytes[ids]
        more = int(sizes.sum()) - len(text.encode())
        if more == 1:  # the space that some put before a text
            controls = np.isin(ids, list(self.controls.values()))
            sizes[int(np.argmin(controls))] -= 1
        elif more:
            raise UserError("the tokenizer changes its text, so that what is trained of it cannot be told")
        ends = np.cumsum(sizes)
        return ends - sizes, ends


def checked(text: str) -> str:
    """The text. UserError where it has no form in UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"holds half a character ({error.object[error.start]!r}), which UTF-8 has not") from None
    return text
