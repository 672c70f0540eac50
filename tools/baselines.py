"""What a language model must beat on a text: gzip, xz and byte n-gram models, in bits per byte of the held-out text.

`python tools/baselines.py --train train.jsonl --valid valid.jsonl`. Compressors see each document alone; n-gram models
are trained on the train text, and their context begins anew with each document.

Source: Witten & Bell 1991 (doi:10.1109/18.87000), escape method C in its interpolated form.
"""

import gzip
import json
import lzma
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import llm.installed  # noqa: F401  (says in one line what is missing)

import numpy as np

from llm.atomic import write_file
from llm.cli import run_cli
from llm.data.documents import read_documents
from llm.errors import UserError
from llm.paths import PathText, refuse_existing

MAX_CONTEXT = 7  # context and byte are packed into one 64-bit number


def compressed_bits_per_byte(documents: Sequence[bytes], compress: Callable[[bytes], bytes]) -> float:
    """Bits per byte when each document is compressed alone."""
    return 8 * sum(len(compress(document)) for document in documents) / sum(map(len, documents))


def gzip_bits_per_byte(documents: Sequence[bytes]) -> float:
    """`gzip -9` of each document."""
    return compressed_bits_per_byte(documents, lambda document: gzip.compress(document, 9, mtime=0))


def xz_bits_per_byte(documents: Sequence[bytes]) -> float:
    """`xz -9` of each document."""
    return compressed_bits_per_byte(documents, lambda document: lzma.compress(document, preset=9))


@dataclass(frozen=True)
class ContextCounts:
    """Counts after contexts of one length. ngrams: sorted context * 256 + byte, counts beside them; contexts: sorted,
    with how often each was followed by anything (total) and by how many different bytes (distinct).
    """

    ngrams: np.ndarray
    counts: np.ndarray
    contexts: np.ndarray
    total: np.ndarray
    distinct: np.ndarray


class WittenBell:
    """Byte n-gram model: P(c | h) = (count(h c) + distinct(h) P(c | shorter h)) / (total(h) + distinct(h)), and 1/256
    below the empty context.

    A context never seen leaves the shorter one's probability.
    """

    def __init__(self, documents: Sequence[bytes], context: int) -> None:
        """`context`: bytes before the predicted one, at most 7."""
        if not 0 <= context <= MAX_CONTEXT:
            raise UserError(f"context={context}: expected 0 to {MAX_CONTEXT} bytes")
        text, position = _joined(documents)
        self.orders = [_count(_ngrams(text, position, length)[1]) for length in range(context + 1)]

    def bits_per_byte(self, documents: Sequence[bytes]) -> float:
        """Total -log2 P of all bytes over their number."""
        text, position = _joined(documents)
        probability = np.full(len(text), 1 / 256)
        for length, order in enumerate(self.orders):
            where, ngrams = _ngrams(text, position, length)
            context_at, seen = _find(order.contexts, ngrams >> 8)
            where, ngrams, context_at = where[seen], ngrams[seen], context_at[seen]
            ngram_at, counted = _find(order.ngrams, ngrams)
            count = np.where(counted, order.counts[ngram_at], 0)
            total, distinct = order.total[context_at], order.distinct[context_at]
            probability[where] = (count + distinct * probability[where]) / (total + distinct)
        return float(-np.log2(probability).sum() / len(text))


def report(train: Sequence[bytes], valid: Sequence[bytes], contexts: Sequence[int]) -> dict[str, float]:
    """Bits per byte of `valid` by the name of each baseline."""
    results = {"gzip -9": gzip_bits_per_byte(valid), "xz -9": xz_bits_per_byte(valid)}
    for context in contexts:
        results[f"{context} bytes of context"] = WittenBell(train, context).bits_per_byte(valid)
    return results


def baselines(
    train: PathText,
    valid: PathText,
    contexts: tuple[int, ...] = (3, 5),
    text_field: str = "text",
    output: PathText | None = None,
) -> None:
    """Print the bits per byte that gzip -9, xz -9 and byte n-gram models reach on the valid text.

    train: text for the n-gram models: a text file, a folder, .jsonl, .jsonl.gz or .parquet
    valid: text that all are measured on
    contexts: bytes of context of the n-gram models, separated by commas
    text_field: field of JSONL and Parquet rows that holds the text
    output: a new JSON file for the results, when wanted
    """
    if output is not None:
        refuse_existing(output, "--output")
    texts = {
        key: [document.text.encode() for document in read_documents(path, text_field=text_field, key=f"--{key}")]
        for key, path in (("train", train), ("valid", valid))
    }
    for key, documents in texts.items():
        if not any(documents):
            raise UserError(f"--{key}: the text is empty")
    results = report(texts["train"], texts["valid"], contexts)
    for name, value in results.items():
        print(f"{name}: {value:.4f} bits per byte")
    if output is not None:
        write_file(Path(output), (json.dumps(results, indent=1) + "\n").encode())


def _joined(documents: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """All bytes one after another, int64, and each one's position in its document."""
    lengths = np.array([len(document) for document in documents])
    text = np.frombuffer(b"".join(documents), dtype=np.uint8).astype(np.int64)
    return text, np.arange(len(text)) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def _ngrams(text: np.ndarray, position: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Places with `length` bytes of context in their document, and context * 256 + byte there."""
    packed = text.copy()
    for back in range(1, length + 1):
        packed[back:] |= text[:-back] << (8 * back)
    where = np.flatnonzero(position >= length)
    return where, packed[where]


def _count(ngrams: np.ndarray) -> ContextCounts:
    unique, counts = np.unique(ngrams, return_counts=True)
    contexts, first, distinct = np.unique(unique >> 8, return_index=True, return_counts=True)
    total = np.add.reduceat(counts, first) if len(counts) else counts
    return ContextCounts(unique, counts, contexts, total, distinct)


def _find(keys: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(index into the sorted `keys`, whether it is there) of each wanted value."""
    if not len(keys):
        return np.zeros(len(wanted), dtype=np.int64), np.zeros(len(wanted), dtype=bool)
    index = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return index, keys[index] == wanted


if __name__ == "__main__":
    run_cli(baselines)
