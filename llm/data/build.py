"""Text to a source folder: documents are tokenised in blocks (the tokenizer's threads, no processes) and written shard
by shard, whole or not at all.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from llm.atomic import new_directory
from llm.data.documents import Document
from llm.data.found import Found
from llm.data.shards import EncodedDocument, ShardEntry, write_shard
from llm.data.source import MANIFEST, SHARDS, FolderEntry, Manifest, TokenizerEntry, TokenSource
from llm.data.split import Split, text_digest
from llm.errors import UserError
from llm.tokenizer import Tokenizer
from llm.tokenizers.parts import MOST_AT_ONCE

BLOCK_CHARACTERS = 1 << 22  # text handed to the tokenizer at once: enough to share out among threads, little memory
SHARD_BYTES = 128 << 20
LINE_INTERVAL_S = 10.0


def build_source(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    output: str | Path,
    *,
    total_bytes: int,
    shard_bytes: int = SHARD_BYTES,
    threads: int = 1,
    name: str = "the input",
    split: Split | None = None,
    found: Callable[[], Found] | None = None,
) -> TokenSource:
    """Tokenise the documents into a new source folder at `output`.

    Args:
        total_bytes: bytes of the input files, for the progress bar.
        name: of the input, for errors.
        shard_bytes: a shard is closed once its tokens take this much; a document is never split.
        split: only the documents of this side.
        found: asked for what the files held, when all documents have been read.

    FileExistsError when `output` exists; UserError when there are no documents or a text cannot be encoded (the
    document is named).
    """
    output = Path(output)
    made_with = TokenizerEntry(
        kind=tokenizer.kind,
        fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
    )
    with progress(f"sharding {output.name}", total_bytes) as move:
        encoded = _encoded(_side(documents, split), tokenizer, threads, move)
        return write_source(encoded, made_with, output, shard_bytes=shard_bytes, name=name, found=found)


class Placed(NamedTuple):
    """A document ready to be written, and the folder that its name starts from."""

    document: EncodedDocument
    folder: str


def write_source(
    documents: Iterable[Placed],
    made_with: TokenizerEntry,
    output: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    name: str = "the input",
    found: Callable[[], Found] | None = None,
) -> TokenSource:
    """Write encoded documents as a new source folder; see `build_source`."""
    dtype = np.dtype(np.uint16 if made_with.vocab_size <= 1 << 16 else np.uint32)
    with new_directory(output) as folder:
        (folder / SHARDS).mkdir()
        entries: list[ShardEntry] = []
        folders: list[tuple[str, int]] = []
        for shard in _shards(_noted(documents, folders), shard_bytes // dtype.itemsize):
            entries.append(write_shard(folder / SHARDS / f"{len(entries):05d}.arrow", shard, dtype))
        if not entries:
            raise NoDocuments(f"{name}: has no documents")
        manifest = Manifest(
            tokenizer=made_with,
            dtype="uint16" if dtype == np.uint16 else "uint32",
            documents=sum(entry.documents for entry in entries),
            tokens=sum(entry.tokens for entry in entries),
            text_bytes=sum(entry.text_bytes for entry in entries),
            shards=tuple(entries),
            folders=_folder_entries(folders),
            found=None if found is None else found(),
        )
        (folder / MANIFEST).write_bytes(manifest.serialized())
    return TokenSource.open(output)


class NoDocuments(UserError):
    """There is nothing to write."""


def _side(documents: Iterable[Document], split: Split | None) -> Iterator[Document]:
    for document in documents:
        if split is None or split.keeps(text_digest(document.text.encode())):
            yield document


def _noted(documents: Iterable[Placed], folders: list[tuple[str, int]]) -> Iterator[EncodedDocument]:
    """The documents; `folders` gets each stretch of one folder with its number of documents, so it stays short."""
    for document, folder in documents:
        if not folders or folders[-1][0] != folder:
            folders.append((folder, 0))
        folders[-1] = (folder, folders[-1][1] + 1)
        yield document


def _folder_entries(folders: list[tuple[str, int]]) -> tuple[FolderEntry, ...]:
    if not any(path for path, _ in folders):
        return ()
    return tuple(FolderEntry(path=path, documents=count) for path, count in folders)


def _encoded(
    documents: Iterable[Document], tokenizer: Tokenizer, threads: int, progress: Callable[[int], None]
) -> Iterator[Placed]:
    begin, end = np.array(tokenizer.begin_ids, np.uint32), np.array([tokenizer.eos_id], np.uint32)
    for block in _blocks(documents):
        if len(block) == 1 and len(block[0].text) >= BLOCK_CHARACTERS:
            encoded_block = [_encode_long(block[0], tokenizer, threads, progress)]
        else:
            encoded_block = _encode_block(block, tokenizer, threads)
        for document, ids in zip(block, encoded_block, strict=True):
            text = document.text.encode()
            encoded = EncodedDocument(np.concatenate((begin, ids, end)), document.key, text_digest(text), len(text))
            yield Placed(encoded, document.folder)
            progress(document.consumed)


def _encode_long(document: Document, tokenizer: Tokenizer, threads: int, progress: Callable[[int], None]) -> np.ndarray:
    """Ids of a long document part by part, with progress inside it."""
    length, found, last = len(document.text), [], 0
    try:
        for ids, done in tokenizer.encode_long(document.text, threads):
            found.append(ids)
            if done - last > MOST_AT_ONCE:
                print(
                    f"{document.called}: {done - last:,} characters were encoded at once, which takes much memory: "
                    f"this tokenizer gives no place in them where a text may be cut",
                    file=sys.stderr,
                    flush=True,
                )
            progress(document.consumed - document.bytes + document.bytes * done // length)
            last = done
    except UserError:
        _encode_block([document], tokenizer, threads)  # its error counts places from the beginning of the document
        raise
    return np.concatenate(found)


def _encode_block(block: list[Document], tokenizer: Tokenizer, threads: int) -> list[np.ndarray]:
    try:
        return tokenizer.encode_batch([document.text for document in block], threads)
    except UserError:
        for document in block:  # which of them was it?
            try:
                tokenizer.encode(document.text)
            except UserError as error:
                raise UserError(f"{document.called}: {error}") from None
        raise


def _blocks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    block: list[Document] = []
    size = 0
    for document in documents:
        if block and len(document.text) >= BLOCK_CHARACTERS:  # alone, as it is encoded part by part
            yield block
            block, size = [], 0
        block.append(document)
        size += len(document.text)
        if size >= BLOCK_CHARACTERS:
            yield block
            block, size = [], 0
    if block:
        yield block


def _shards(documents: Iterable[EncodedDocument], shard_tokens: int) -> Iterator[list[EncodedDocument]]:
    shard: list[EncodedDocument] = []
    size = 0
    for document in documents:
        shard.append(document)
        size += len(document.tokens)
        if size >= shard_tokens:
            yield shard
            shard, size = [], 0
    if shard:
        yield shard


@contextmanager
def progress(doing: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Call it with the bytes of the input that are done: a bar on a terminal; elsewhere (log files) a plain line now
    and then.
    """
    if sys.stderr.isatty():
        with tqdm(total=total_bytes, unit="B", unit_scale=True, desc=doing) as bar:

            def move(done: int) -> None:
                bar.update(done - bar.n)

            yield move
        return
    began = last = time.monotonic()

    def line(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= LINE_INTERVAL_S:
            last = now
            share = done / max(1, total_bytes)
            print(
                f"{doing}: {share:.0%} of {total_bytes / 1e6:.1f} MB, {now - began:.0f} s",
                file=sys.stderr,
                flush=True,
            )

    yield line
