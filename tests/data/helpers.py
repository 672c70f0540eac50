"""Small sources for the data tests."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from llm.data.build import build_source
from llm.data.documents import Document
from llm.data.source import TokenSource
from llm.tokenizer import ByteTokenizer, Tokenizer


def documents_of(texts: Sequence[str]) -> Iterator[Document]:
    return (Document(f"doc{i}", text, 0) for i, text in enumerate(texts))


def make_source(
    path: Path, texts: Sequence[str], tokenizer: Tokenizer | None = None, shard_bytes: int = 1 << 20
) -> TokenSource:
    """A source of `texts` in byte tokens, if nothing else is said."""
    return build_source(documents_of(texts), tokenizer or ByteTokenizer(), path, total_bytes=0, shard_bytes=shard_bytes)


def random_texts(n: int, seed: int = 0, mean_length: int = 50) -> list[str]:
    """`n` texts of different lengths, some of them empty."""
    draw = np.random.default_rng(seed)
    return ["".join(draw.choice(list("abcdefgh \n"), size=length)) for length in draw.integers(0, 2 * mean_length, n)]


def stream_of(texts: Sequence[str], tokenizer: Tokenizer | None = None) -> np.ndarray:
    """The token stream that a source of `texts` must hold, made without it."""
    tokenizer = tokenizer or ByteTokenizer()
    return np.concatenate([[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in texts])


def flip_byte(path: Path, position: int) -> None:
    """Change one byte of a file in place."""
    content = bytearray(path.read_bytes())
    content[position] ^= 0x40
    path.write_bytes(content)
