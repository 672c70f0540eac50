"""A share of the documents held out, each by the hash of its text: the same ones whatever files they lie in, in
whatever order, and in whatever tokenizer's ids. Copies of a document are on the same side.
"""

import hashlib
from dataclasses import dataclass
from typing import Literal

KEY = b"held out"  # fixed, so that a document is held out everywhere or nowhere


@dataclass(frozen=True)
class Split:
    """One side of a split. share: of the documents that are held out, between 0 and 1."""

    share: float
    part: Literal["train", "valid"]

    def keeps(self, text_digest: bytes) -> bool:
        """Whether a document, known by the digest of its text, is on this side."""
        place = int.from_bytes(hashlib.blake2b(text_digest, digest_size=8, key=KEY).digest(), "big") / 2**64
        return (place < self.share) == (self.part == "valid")


def text_digest(text: bytes) -> bytes:
    """What a document is known by: blake2b-128 of its UTF-8 bytes."""
    return hashlib.blake2b(text, digest_size=16).digest()
