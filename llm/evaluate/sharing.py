"""Which tokens several requests have in common, so that they are computed once: a forest of pieces of sequences.

It follows from all requests of an evaluation, never from which of them are computed when, or where: how a sequence is
cut into pieces decides in what order its attention is summed.
"""

import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

LEAST_TOKENS = 4
"""Of a piece that several go on from."""
LEAST_SAVED = 0.2
"""Tokens that a common piece saves, of all that it and what goes on from it would be without it. Below, what is saved
is not worth the attention over a path, whose keys are gathered for each piece that goes on from it."""


@dataclass(frozen=True)
class Tokens:
    """What a request has to compute."""

    ids: tuple[int, ...]
    apart: str = ""
    """Only sequences that have it in common share anything."""
    whole: int = 0
    """The first so many tokens are shared together or not at all."""


@dataclass(frozen=True)
class Piece:
    """Tokens of one or more sequences that stand at the same place of each."""

    parent: int
    """the piece before it, -1 = it begins its sequences"""
    owner: int
    """one of its sequences"""
    start: int
    end: int
    """where it stands in them"""

    def __len__(self) -> int:
        return self.end - self.start


@dataclass
class _Common:
    """Neighbours in sorted order that have their first `length` tokens in common, and no more."""

    length: int
    parts: list["_Common | int"] = field(default_factory=list)
    """numbers of sequences, and those that have more in common"""
    beyond: int = 0
    """tokens that follow, each counted once where parts of them are in common again"""


class Forest:
    """How sequences are cut."""

    def __init__(self, sequences: Sequence[Tokens], share: bool = True) -> None:
        """share: whether any tokens are to be computed once for several."""
        self.pieces: list[Piece] = []
        self.last: list[int] = [-1] * len(sequences)
        """Of each sequence, the piece with which it ends."""
        self._sequences = sequences
        if not share:
            for number, sequence in enumerate(sequences):
                self.last[number] = self._add(-1, number, 0, len(sequence.ids))
            return
        for top in _common(sequences):
            self._cut(top, -1, 0)

    def path(self, number: int) -> list[int]:
        """The pieces of a sequence, in order."""
        found = []
        piece = self.last[number]
        while piece >= 0:
            found.append(piece)
            piece = self.pieces[piece].parent
        return found[::-1]

    def _cut(self, top: "_Common | int", parent: int, done: int) -> None:
        """Make the pieces of one or more sequences, of which the first `done` tokens are in pieces."""
        waiting = [(top, parent, done)]
        while waiting:
            part, parent, done = waiting.pop()
            if isinstance(part, int):
                length = len(self._sequences[part].ids)
                self.last[part] = parent if length == done else self._add(parent, part, done, length)
                continue
            if _pays(part, done):
                parent = self._add(parent, _any_of(part), done, part.length)
                done = part.length
            waiting += [(inner, parent, done) for inner in reversed(part.parts)]

    def _add(self, parent: int, owner: int, start: int, end: int) -> int:
        self.pieces.append(Piece(parent, owner, start, end))
        return len(self.pieces) - 1


def _pays(common: _Common, done: int) -> bool:
    length = common.length - done
    saved = (len(common.parts) - 1) * length
    return length >= LEAST_TOKENS and saved >= LEAST_SAVED * (saved + length + common.beyond)


def _any_of(common: _Common) -> int:
    part: _Common | int = common
    while not isinstance(part, int):
        part = part.parts[0]
    return part


def _common(sequences: Sequence[Tokens]) -> list[_Common | int]:
    """What sequences have in common: those, and groups of them, that have nothing in common with others."""
    words = [np.array(sequence.ids, dtype=">u4") for sequence in sequences]
    keys = [array("I", sequence.ids) for sequence in sequences]
    if sys.byteorder == "little":
        for key in keys:
            key.byteswap()  # so that bytes are ordered as numbers are
    order = sorted(range(len(sequences)), key=lambda i: (sequences[i].apart, keys[i].tobytes(), i))
    root = _Common(0)
    stack = [root]  # of ever longer common beginnings, with the sequence before
    for place, number in enumerate(order):
        shared = _shared(sequences, words, order[place - 1], number) if place else 0
        taken: _Common | int | None = None
        while stack[-1].length > shared:
            closed = stack.pop()
            _count(closed, sequences)
            if stack[-1].length < shared:
                stack.append(_Common(shared, [closed]))
            else:
                stack[-1].parts.append(closed)
        if stack[-1].length < shared:  # the sequence before was alone so far
            taken = stack[-1].parts.pop()
            stack.append(_Common(shared, [taken]))
        stack[-1].parts.append(number)
    while len(stack) > 1:
        closed = stack.pop()
        _count(closed, sequences)
        stack[-1].parts.append(closed)
    return root.parts


def _count(common: _Common, sequences: Sequence[Tokens]) -> None:
    for part in common.parts:
        if isinstance(part, int):
            common.beyond += len(sequences[part].ids) - common.length
        else:
            common.beyond += part.length - common.length + part.beyond


def _shared(sequences: Sequence[Tokens], words: Sequence[np.ndarray], first: int, second: int) -> int:
    """How many tokens two sequences begin with in common."""
    a, b = sequences[first], sequences[second]
    if a.apart != b.apart:
        return 0
    least = min(len(a.ids), len(b.ids))
    differ = words[first][:least] != words[second][:least]
    found = int(differ.argmax()) if differ.any() else least
    return found if found >= max(a.whole, b.whole) else 0
