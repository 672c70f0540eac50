"""The tokenizer of a run without text, as one over values is: it stands where runs have one, and knows no words."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np

from llm.errors import UserError
from llm.tokenizers.base import TokenIds, Tokenizer, TokenizerConfig


class NoText(Tokenizer):
    """One id, 0, which stands at every position of rows of values; no text becomes it, and it becomes none."""

    kind = "none"
    vocab_size = 1
    bos_id = eos_id = 0
    fingerprint = hashlib.blake2b(b"none", digest_size=16).hexdigest()

    @property
    def begin_ids(self) -> tuple[int, ...]:
        return ()

    @property
    def control_tokens(self) -> Mapping[str, int]:
        return {}

    def encode(self, text: str) -> NoReturn:
        """Raises UserError."""
        raise UserError("tokenizer.kind=none: a run over values has no tokenizer, so it reads no text")

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode_bytes(self, ids: TokenIds) -> bytes:
        return b""

    def save(self, directory: Path) -> TokenizerConfig:
        return TokenizerConfig(kind="none")
