"""Texts as rows for an encoder-decoder (prefix language modelling): of each document, or the part of one that a row
holds, the first half of the tokens is the source, and the rest the target.

Were the whole text on both sides, a target would only have to be copied.
"""

import hashlib
import json

import numpy as np
from numpy.typing import NDArray

from llm.batch import IGNORE
from llm.data.pair_rows import SEQ2SEQ
from llm.data.rows import Row, RowSource, RowTargets, SourceSide, TokenOrigin

HALVES_VERSION = 1
"""To be raised with any change of what becomes of a text."""


class Halved:
    """The rows of texts of `inner`, each document in two. begin_id: the token that begins a target; end_id: the one
    that ends a source, as it does when the model generates.
    """

    targets: tuple[str, ...] = (SEQ2SEQ,)
    values: tuple[str, ...] = ()

    def __init__(self, inner: RowSource, begin_id: int, end_id: int) -> None:
        self.inner, self.begin_id, self.end_id = inner, begin_id, end_id
        self.n_rows = inner.n_rows
        parts = [SEQ2SEQ, HALVES_VERSION, inner.fingerprint, begin_id, end_id]
        self.fingerprint = hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()

    def read(self, k: int, epoch: int) -> Row:
        pairs = [halves(tokens_n) for tokens_n in _texts(self.inner.read(k, epoch))]
        begin = np.array([self.begin_id])
        inputs = [np.concatenate((begin, target[:-1])) for _, target in pairs]
        labels = [target if len(target) else np.array([IGNORE]) for _, target in pairs]
        sources = [self._ended(source, len(source) + len(target)) for source, target in pairs]
        side = SourceSide(np.concatenate(sources), _starts(sources))
        return Row(np.concatenate(inputs), {SEQ2SEQ: RowTargets(np.concatenate(labels))}, _starts(inputs), source=side)

    def _ended(self, source: NDArray[np.int64], n: int) -> NDArray[np.int64]:
        """n: tokens of the whole. Where they are two, the end would take a position more than the row has for them."""
        return np.append(source, self.end_id) if n > 2 else source

    def origin(self, k: int, epoch: int, position: int) -> TokenOrigin:
        """Of the token of the text that is the label at a position of the target."""
        at = 0
        row = self.inner.read(k, epoch)
        for start, tokens_n in zip(row.starts.tolist(), _texts(row), strict=True):
            source, target = halves(tokens_n)
            if position < at + max(1, len(target)):
                place = self.inner.origin(k, epoch, start)
                offset = min(len(source) + position - at, len(tokens_n) - 1)
                return TokenOrigin(place.origin, place.document, place.offset + offset, place.length)
            at += max(1, len(target))
        raise IndexError(f"position {position} of a row with {at}")

    def described(self) -> str:
        return self.inner.described()


def halves(tokens_n: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Source and target of a text; one token alone is a source without a target."""
    middle = max(1, len(tokens_n) // 2)
    return tokens_n[:middle], tokens_n[middle:]


def _texts(row: Row) -> list[NDArray[np.int64]]:
    """The tokens that a row holds of each document, a last label among them."""
    labels, ends = row.targets["lm"].labels, [*row.starts[1:].tolist(), len(row.tokens)]
    return [
        np.append(row.tokens[start:end], labels[end - 1 : end][labels[end - 1 : end] >= 0])
        for start, end in zip(row.starts.tolist(), ends, strict=True)
    ]


def _starts(parts: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.cumsum([0, *map(len, parts[:-1])])
