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


LONGEST_DROPPED = 256
"""Bytes in a row that a tokenizer may drop from a text without the place of its ids being lost."""


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

    def spans(
        self, text: str, ids: NDArray[np.int64], typed: Sequence[Span] = ()
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The bytes of the text, from and to, that each id stands for; `typed` as it was encoded."""
        sizes = self._bytes[ids]
        more = int(sizes.sum()) - len(text.encode())
        if more == 1 and not self._is_control(ids).all():  # the space that some put before a text
            sizes[int(np.argmin(self._is_control(ids)))] -= 1
        elif more:
            return self._found_spans(text, ids, typed)
        ends = np.cumsum(sizes)
        return ends - sizes, ends

    def _is_control(self, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        return np.isin(ids, list(self.controls.values()))

    def _found_spans(
        self, text: str, ids: NDArray[np.int64], typed: Sequence[Span]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """`spans` where the tokenizer changed the text, as by dropping blanks: control tokens stand where the text has
        them, and between them the ids are looked for in their order. UserError where not all control tokens are there.
        """
        places = [span for _, span in self.control_places(text, typed)]
        (at,) = np.nonzero(self._is_control(ids))
        if len(at) != len(places):
            raise UserError("the tokenizer changes its text, so that what is trained of it cannot be known")
        ends = np.zeros(len(ids), dtype=np.int64)
        begin, done = 0, 0
        for number, (start, end) in zip([*at.tolist(), len(ids)], [*places, (len(text), len(text))], strict=True):
            base = len(text[:done].encode())
            ends[begin:number] = [base + place for place in self._ends_in(text[done:start].encode(), ids[begin:number])]
            if number < len(ids):
                ends[number] = len(text[:end].encode())
            begin, done = number + 1, end
        return np.concatenate(([0], ends[:-1])), ends

    def _ends_in(self, part: bytes, ids: NDArray[np.int64]) -> list[int]:
        """Where each id ends in a part of a text, of which each has something; the last one ends with it."""
        found, done = [], 0
        for size, number in zip(self._bytes[ids].tolist(), ids.tolist(), strict=True):
            piece = self.tokenizer.decode_bytes([number]) or b" "
            place = part.find(piece.strip() or piece, done, done + 2 * size + LONGEST_DROPPED)
            done = min(len(part), done + size if place < 0 else place + len(piece.strip() or piece))
            found.append(done)
        return [*found[:-1], len(part)] if found else []


def checked(text: str) -> str:
    """The text. UserError where it has no form in UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"holds half a character ({error.object[error.start]!r}), which UTF-8 has not") from None
    return text
