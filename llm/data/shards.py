"""One shard: an Arrow IPC file, uncompressed, with one record batch of whole documents, so that its tokens are one flat
array in the page cache.

Arrow itself does not notice a flipped byte; the digests in the manifest do: crc32 of each column (checked once when a
shard is first mapped) and blake2b of the file (checked on request).
"""

import hashlib
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from llm.data.formats import MAGIC_ARROW
from llm.errors import UserError


class ShardEntry(BaseModel):
    """What the manifest says of a shard."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^\d+\.arrow$")
    documents: int
    tokens: int
    text_bytes: int
    file_bytes: int
    blake2b: str
    crc32: dict[str, int]


@dataclass(frozen=True)
class EncodedDocument:
    """A document ready to be written: tokens (with its begin and end marks), where it came from, digest and length of
    its text.
    """

    tokens: np.ndarray
    name: str
    text_digest: bytes
    text_bytes: int


def write_shard(path: Path, documents: list[EncodedDocument], dtype: np.dtype) -> ShardEntry:
    """Write the documents to `path`; the caller syncs and renames. Columns: tokens, name, digest (blake2b-128 of the
    text), text_bytes.
    """
    offsets = np.zeros(len(documents) + 1, dtype=np.int64)
    np.cumsum([len(document.tokens) for document in documents], out=offsets[1:])
    values = np.empty(int(offsets[-1]), dtype=dtype)
    for document, start, stop in zip(documents, offsets, offsets[1:], strict=False):
        values[start:stop] = document.tokens
    batch = pa.RecordBatch.from_arrays(
        [
            pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values)),
            pa.array([document.name for document in documents], pa.large_string()),
            pa.array([document.text_digest for document in documents], pa.binary(16)),
            pa.array([document.text_bytes for document in documents], pa.int64()),
        ],
        names=["tokens", "name", "digest", "text_bytes"],
    )
    return write_batch(path, batch, len(values), sum(document.text_bytes for document in documents))


def write_batch(path: Path, batch: pa.RecordBatch, tokens: int, text_bytes: int) -> ShardEntry:
    """Write a shard of one record batch to `path`; the caller syncs and renames."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return ShardEntry(
        name=path.name,
        documents=batch.num_rows,
        tokens=tokens,
        text_bytes=text_bytes,
        file_bytes=path.stat().st_size,
        blake2b=file_digest(path),
        crc32={name: column_crc32(batch.column(name)) for name in batch.schema.names},
    )


class Shard:
    """A shard mapped into memory. Opening checks the layout and the token column's crc32; UserError names the shard
    when something is off.

    tokens: (n_tokens,) uint16 or uint32; starts: (n_documents + 1,) int64, where each document begins, then n_tokens.
    """

    def __init__(self, path: Path, entry: ShardEntry) -> None:
        self.path = path
        self._entry = entry
        self._names: pa.Array | None = None
        batch = _read_batch(path)
        try:
            column = batch.column("tokens")
            self.tokens: np.ndarray = column.values.to_numpy(zero_copy_only=True)
            self.starts: np.ndarray = column.offsets.to_numpy(zero_copy_only=True)
            whole = len(self.tokens) == entry.tokens and len(self.starts) == entry.documents + 1
            whole = whole and int(self.starts[0]) == 0 and int(self.starts[-1]) == entry.tokens
        except (pa.ArrowException, KeyError, AttributeError) as error:
            raise damaged(path, str(error)) from None
        if not whole:
            raise damaged(path, "its number of documents or tokens differs from the manifest's")
        if column_crc32(column) != entry.crc32["tokens"]:
            raise damaged(path, "the tokens differ from the manifest's crc32")

    def name(self, document: int) -> str:
        """The name that the shard's document `document` was written with. UserError naming the shard when its column of
        names, which is checked when it is first used, is damaged.
        """
        if self._names is None:
            self._names = self.column("name")
        return str(self._names[document].as_py())

    def column(self, name: str) -> pa.Array:
        """A column. UserError naming the shard when it is damaged."""
        return _checked_column(self.path, self._entry, name)

    def large_column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """A column of bytes (offsets (n_documents + 1,) int64, content (bytes,) uint8), mapped and unread: whoever
        reads a part of it checks that part. UserError naming the shard when the offsets cannot be true."""
        return _large_column(self.path, self._entry, name)


def text_digests(path: Path, entry: ShardEntry) -> np.ndarray:
    """Digests of the texts of a shard, (n_documents, 16) uint8, without looking at its tokens. UserError naming the
    shard when they are damaged."""
    column = _checked_column(path, entry, "digest")
    return np.frombuffer(column.buffers()[1], np.uint8, 16 * len(column)).reshape(-1, 16)


def lengths(path: Path, entry: ShardEntry) -> np.ndarray:
    """Tokens of each document, (n_documents,) int64, without looking at the tokens. UserError naming the shard when
    they cannot be true.
    """
    try:
        found: np.ndarray = np.diff(_read_batch(path).column("tokens").offsets.to_numpy())
    except (pa.ArrowException, KeyError, AttributeError, ValueError) as error:
        raise damaged(path, str(error)) from None
    if len(found) != entry.documents or int(found.min(initial=0)) < 0 or int(found.sum()) != entry.tokens:
        raise damaged(path, "its number of documents or tokens differs from the manifest's")
    return found


def large_sizes(path: Path, entry: ShardEntry, name: str) -> np.ndarray:
    """Bytes of each document in a column of bytes, (n_documents,) int64, without looking at them. UserError naming the
    shard when they cannot be true."""
    return np.diff(_large_column(path, entry, name)[0])


def _large_column(path: Path, entry: ShardEntry, name: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        column = _read_batch(path).column(name)
        offsets = np.frombuffer(column.buffers()[1], np.int64, len(column) + 1)
        content = np.frombuffer(column.buffers()[2] or b"", np.uint8)
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise damaged(path, str(error)) from None
    rising = len(offsets) == entry.documents + 1 and offsets[0] == 0 and bool((np.diff(offsets) >= 0).all())
    if not rising or int(offsets[-1]) > len(content):
        raise damaged(path, f"where the {name} of its documents begin cannot be true")
    return offsets, content


def text_sizes(path: Path, entry: ShardEntry) -> np.ndarray:
    """Bytes of each text of a shard, (n_documents,) int64; see text_digests."""
    sizes: np.ndarray = _checked_column(path, entry, "text_bytes").to_numpy()
    return sizes


def _checked_column(path: Path, entry: ShardEntry, name: str) -> pa.Array:
    try:
        column = _read_batch(path).column(name)
        whole = len(column) == entry.documents and column_crc32(column) == entry.crc32[name]
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise damaged(path, str(error)) from None
    if not whole:
        raise damaged(path, f"the {name}s of its documents differ from the manifest's crc32")
    return column


def check_size(path: Path, entry: ShardEntry) -> None:
    """The cheap check that is always made: the file is there, has its length and the format's first and last bytes."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(len(MAGIC_ARROW))
            file.seek(max(0, size - len(MAGIC_ARROW)))
            tail = file.read()
    except OSError as error:
        raise damaged(path, error.strerror or str(error)) from None
    if size != entry.file_bytes:
        raise damaged(path, f"{size} bytes long where the manifest says {entry.file_bytes}")
    if head != MAGIC_ARROW or tail != MAGIC_ARROW:
        raise damaged(path, "not an Arrow IPC file")


def check_content(path: Path, entry: ShardEntry, vocab_size: int) -> None:
    """The full check: size, blake2b of the file, crc32 of every column, every token inside the vocabulary."""
    check_size(path, entry)
    if file_digest(path) != entry.blake2b:
        raise damaged(path, "the file differs from the manifest's blake2b")
    shard = Shard(path, entry)
    batch = _read_batch(path)
    for name, crc32 in entry.crc32.items():
        if column_crc32(batch.column(name)) != crc32:
            raise damaged(path, f"column {name} differs from the manifest's crc32")
    if int(shard.tokens.max(initial=0)) >= vocab_size:
        raise damaged(path, f"token {int(shard.tokens.max())} is outside the vocabulary of {vocab_size}")


def damaged(path: Path, reason: str) -> UserError:
    """The error of every broken shard."""
    return UserError(f"damaged shard {path}: {reason}; remove its folder and make it again, or copy the shard again")


def column_crc32(column: pa.Array) -> int:
    """crc32 over what a column holds (offsets, then data), without Arrow's padding."""
    parts: list[np.ndarray]
    if pa.types.is_large_list(column.type):
        parts = [column.offsets.to_numpy(), column.values.to_numpy()]
    elif pa.types.is_large_string(column.type) or pa.types.is_large_binary(column.type):
        offsets = np.frombuffer(column.buffers()[1], dtype=np.int64, count=len(column) + 1)
        parts = [offsets, np.frombuffer(column.buffers()[2] or b"", dtype=np.uint8, count=int(offsets[-1]))]
    elif pa.types.is_fixed_size_binary(column.type):
        parts = [np.frombuffer(column.buffers()[1], dtype=np.uint8, count=len(column) * column.type.byte_width)]
    else:
        parts = [column.to_numpy()]
    crc = 0
    for part in parts:
        crc = zlib.crc32(np.ascontiguousarray(part).data.cast("B"), crc)
    return crc


def file_digest(path: Path) -> str:
    """Hex blake2b-256 of a file."""
    digest = hashlib.blake2b(digest_size=32)
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _read_batch(path: Path) -> pa.RecordBatch:
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path), "r"))
        if reader.num_record_batches != 1:
            raise damaged(path, f"{reader.num_record_batches} record batches where there must be one")
        return reader.get_batch(0)
    except (pa.ArrowException, OSError) as error:
        raise damaged(path, str(error)) from None
