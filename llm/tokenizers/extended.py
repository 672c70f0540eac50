"""A tokenizer with more control tokens than its file has: those of a chat template that a run added to it."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from llm.errors import UserError
from llm.tokenizers.base import ENDS_A_TURN, TokenIds, Tokenizer, TokenizerConfig


class ExtendedTokenizer(Tokenizer):
    """`inner`, and control tokens whose ids follow its own. No text becomes one, only a template or a prompt."""

    def __init__(self, inner: Tokenizer, names: Sequence[str]) -> None:
        """UserError where a name is there already or twice."""
        taken = [name for name in names if name in inner.control_tokens or list(names).count(name) > 1]
        if taken:
            raise UserError(f"tokenizer.added_tokens: {taken[0]!r} is a control token of it already")
        self.inner, self.names = inner, tuple(names)
        self.kind, self.bos_id, self.eos_id = inner.kind, inner.bos_id, inner.eos_id
        self.vocab_size = inner.vocab_size + len(names)
        self.added = {name: inner.vocab_size + i for i, name in enumerate(names)}
        content = json.dumps([inner.fingerprint, inner.vocab_size, list(names)]).encode()
        self.fingerprint = hashlib.blake2b(content, digest_size=16).hexdigest()
        self.lossy = getattr(inner, "lossy", False)
        self._splitter = re.compile("(" + "|".join(map(re.escape, sorted(names, key=len, reverse=True))) + ")")

    @property
    def control_tokens(self) -> Mapping[str, int]:
        return {**self.inner.control_tokens, **self.added}

    @property
    def begin_ids(self) -> tuple[int, ...]:
        return self.inner.begin_ids

    @property
    def after_ids(self) -> tuple[int, ...]:
        return self.inner.after_ids

    @property
    def end_ids(self) -> tuple[int, ...]:
        return (*self.inner.end_ids, *(number for name, number in self.added.items() if name in ENDS_A_TURN))

    def prompt_ids(self, text: str) -> list[int]:
        first, *rest = self._splitter.split(text)
        ids = self.inner.prompt_ids(first) if first or not rest else list(self.begin_ids)
        for i, part in enumerate(rest):
            ids += self.encode_inside(part) if i % 2 else [self.added[part]]
        return ids

    def encode(self, text: str) -> list[int]:
        return self.inner.encode(text)

    def encode_inside(self, text: str) -> list[int]:
        return self.inner.encode_inside(text)

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        return self.inner.encode_batch(texts, threads)

    def parts(self, text: str) -> list[str]:
        return self.inner.parts(text)

    def encode_rest(self, parts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        return self.inner.encode_rest(parts, threads)

    def decode_bytes(self, ids: TokenIds) -> bytes:
        return self.inner.decode_bytes(ids)  # ids beyond its own give nothing

    def added_bytes(self, token: int) -> bytes | None:
        return self.inner.added_bytes(token) if token < self.inner.vocab_size else b""

    def token_bytes(self) -> np.ndarray:
        return np.concatenate([self.inner.token_bytes(), np.zeros(len(self.names), dtype=np.int64)])

    def save(self, directory: Path) -> TokenizerConfig:
        return self.inner.save(directory).model_copy(update={"added_tokens": self.names})


def with_tokens(tokenizer: Tokenizer, names: Sequence[str]) -> Tokenizer:
    """The tokenizer with these control tokens too, behind those that it was given before."""
    if not names:
        return tokenizer
    if isinstance(tokenizer, ExtendedTokenizer):
        return ExtendedTokenizer(tokenizer.inner, [*tokenizer.names, *names])
    return ExtendedTokenizer(tokenizer, names)
