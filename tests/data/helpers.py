"""Small sources for the data tests."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from llm.batch import Batch, Counts
from llm.data.build import build_source
from llm.data.documents import Document
from llm.data.heldout import HeldOut
from llm.data.loader import TrainLoader
from llm.data.mixture import Mixture
from llm.data.source import TokenSource
from llm.data.stream import Stream
from llm.objectives import objectives_of
from llm.tasks import task_named
from llm.tokenizer import ByteTokenizer, Tokenizer

LM = objectives_of(task_named("lm").objectives())
"""What a run trains for that says nothing of it."""


def documents_of(texts: Sequence[str]) -> Iterator[Document]:
    return (Document(f"doc{i}", text, 0) for i, text in enumerate(texts))


def make_source(
    path: Path, texts: Sequence[str], tokenizer: Tokenizer | None = None, shard_bytes: int = 1 << 20
) -> TokenSource:
    """A source of `texts` in byte tokens, if nothing else is said."""
    return build_source(documents_of(texts), tokenizer or ByteTokenizer(), path, total_bytes=0, shard_bytes=shard_bytes)


def mixture_of(sources: Sequence[tuple[str, TokenSource, float]], seq_len: int, seed: int) -> Mixture:
    """A mixture of streams of text, filled up as a run fills it."""
    rows = [(name, Stream(source, seq_len), weight) for name, source, weight in sources]
    return Mixture(rows, seq_len, seed, ByteTokenizer.eos_id)


def token_source(mixture: Mixture, number: int) -> TokenSource:
    """What the rows of a mixture's source are cut from."""
    stream = mixture.sources[number]
    assert isinstance(stream, Stream)
    return stream.source


def held_out_of(sources: Sequence[TokenSource], seq_len: int, limit: int | None) -> HeldOut:
    """The rows of streams of text that a validation reads."""
    return HeldOut([Stream(source, seq_len, to_the_end=True) for source in sources], seq_len, limit)


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


def labels_of(batch: Batch) -> torch.Tensor:
    """(B, T), of the next tokens."""
    return batch.targets["lm"].labels


def loader_of(
    mixture: Mixture,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int,
    ranks: int,
    start_row: int = 0,
    count: Callable[[Sequence[Batch]], Counts] = LM.count,
) -> TrainLoader:
    """A loader of rows as long as the mixture's."""
    return TrainLoader(
        mixture,
        seq_len=mixture.seq_len,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        dp_rank=rank,
        dp_size=ranks,
        count=count,
        start_row=start_row,
    )
