"""Rows some of whose tokens are to be guessed from both sides (masked language modelling, Devlin et al. 2018,
arXiv:1810.04805): the tokens of another source's rows, a share of them hidden.

Each token is chosen by itself, with the same chance. Of the chosen ones most become the mask token, some a random
token, and the rest stay as they are: at all of them the original token is the label. Control tokens are never chosen,
and no random token is one.

Which tokens are chosen, and what becomes of them, is a function of the seed, the pass over the source and the row,
16 bytes of SHAKE128 for each position: the same on every layout, after a resume, and in whatever order rows are read.

Shapes: n positions of a row in use, V ids of the tokenizer.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from llm.batch import IGNORE
from llm.data.rows import Row, RowSource, RowTargets, TokenOrigin, tiles_of

MASKS_VERSION = 1
"""To be raised with any change of which tokens are chosen or what becomes of them."""
TARGET = "mlm"
WORDS = np.dtype([("chosen", "<u4"), ("becomes", "<u4"), ("token", "<u8")])
"""Of a position: whether it is chosen, what becomes of it, and which random token."""


@dataclass(frozen=True)
class Masking:
    """What is hidden of a text, and how."""

    mask_id: int
    plain_V: NDArray[np.bool_]
    """(V,) ids that stand for text: those that may be chosen, and drawn."""
    rate: float = 0.15
    """Share of the plain tokens that are chosen."""
    mask: float = 0.8
    """Share of the chosen ones that become the mask token."""
    random: float = 0.1
    """Share of them that become a random token; the rest stay."""

    @cached_property
    def _plain_ids(self) -> NDArray[np.int64]:
        return np.flatnonzero(self.plain_V)

    @property
    def digest(self) -> list[object]:
        """All that decides what is done to a row, besides its key."""
        ids = hashlib.blake2b(np.packbits(self.plain_V).tobytes(), digest_size=16).hexdigest()
        return [MASKS_VERSION, self.mask_id, len(self.plain_V), ids, self.rate, self.mask, self.random]

    def hidden(self, tokens_n: NDArray[np.int64], key: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """What the model reads, and the labels: the original tokens at the chosen positions, both (n,)."""
        drawn = np.frombuffer(hashlib.shake_128(key.encode()).digest(WORDS.itemsize * len(tokens_n)), WORDS)
        becomes_n = drawn["becomes"] / 2.0**32
        chosen_n = (drawn["chosen"] / 2.0**32 < self.rate) & self.plain_V[tokens_n]
        random_n = self._plain_ids[(drawn["token"] % np.uint64(len(self._plain_ids))).astype(np.int64)]
        shown_n = np.where(becomes_n < self.mask, self.mask_id, random_n)
        shown_n = np.where(chosen_n & (becomes_n < self.mask + self.random), shown_n, tokens_n)
        return shown_n, np.where(chosen_n, tokens_n, IGNORE)


class Masked:
    """The rows of `inner`, masked; they see both ways. seed: of the run; None for held-out rows, which are masked alike
    in every validation of every run.
    """

    targets: tuple[str, ...] = (TARGET,)

    def __init__(self, inner: RowSource, masking: Masking, seed: int | None) -> None:
        self.inner, self.masking, self.seed = inner, masking, seed
        self.n_rows, self.values = inner.n_rows, inner.values
        parts = [TARGET, inner.fingerprint, *masking.digest]
        self.fingerprint = hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()

    def read(self, k: int, epoch: int) -> Row:
        row = self.inner.read(k, epoch)
        place = ["held-out"] if self.seed is None else [self.seed, epoch]
        key = json.dumps([TARGET, MASKS_VERSION, self.inner.fingerprint, *place, k])
        tokens_n, labels_n = self.masking.hidden(row.tokens, key)
        return replace(row, tokens=tokens_n, targets={TARGET: RowTargets(labels_n)}, causal=False)

    def tiles(self, k: int, epoch: int) -> int:
        return tiles_of(self.inner, k, epoch)

    def origin(self, k: int, epoch: int, position: int) -> TokenOrigin:
        return self.inner.origin(k, epoch, position)

    def described(self) -> str:
        return self.inner.described()
