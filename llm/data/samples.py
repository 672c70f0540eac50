"""Samples on disk: a folder with `manifest.json` and `shards/*.arrow` of what trains as a whole, in tokens, with the
weights of the targets beside them. Made once from raw rows, whatever the length of the rows that a run packs them into.

A shard has the columns tokens, weights (in 1,024ths, so that their sums are exact), turn_ends, name (file and row) and
digest (of the content that the sample was made from). An item is what is packed as one: a sample, or the samples of a
pair, which follow one another.

Shapes: n tokens of a sample.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from llm.atomic import new_directory
from llm.data.documents import split_key
from llm.data.found import Found
from llm.data.rows import Origin
from llm.data.sample import Sample
from llm.data.shards import Shard, ShardEntry, check_content, check_size, damaged, lengths, text_digests, write_batch
from llm.data.source import MANIFEST, SHARDS, FolderEntry, TokenizerEntry
from llm.errors import UserError

PARTS = 1024
"""Weights are kept in this part of 1."""
SHARD_TOKENS = 1 << 22


class SampleManifest(BaseModel):
    """`manifest.json`: what the shards hold and how to know that they still do."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    kind: Literal["samples"] = "samples"
    made_as: str
    """The kind of data."""
    tokenizer: TokenizerEntry
    samples_per_item: int
    samples: int
    tokens: int
    trained: int
    """Tokens that are targets."""
    without_target: int
    """Items that have none."""
    shards: tuple[ShardEntry, ...]
    folders: tuple[FolderEntry, ...] = ()
    """Where the names of the samples start from."""
    found: Found | None = None
    """What the files held and what was left out."""

    def fingerprint(self) -> str:
        """Hex digest of everything but `folders` and `found`: the same samples give the same one, wherever they lay."""
        return digest_of(self.model_dump(mode="json", exclude={"folders", "found"}))

    def serialized(self) -> bytes:
        """The content of manifest.json: the fields, and a digest of all of them."""
        fields = self.model_dump(mode="json")
        return (json.dumps({**fields, "digest": digest_of(fields), "fingerprint": self.fingerprint()}) + "\n").encode()


def digest_of(value: object) -> str:
    """Hex digest of a value that JSON can hold."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class StoredItem:
    """An item to be stored. key: file and row; digest: of its content, 16 bytes."""

    samples: tuple[Sample, ...]
    key: str
    folder: str
    digest: bytes


def write_samples(
    items: Iterable[StoredItem],
    made_as: str,
    samples_per_item: int,
    tokenizer: TokenizerEntry,
    output: Path,
    found: Callable[[], Found],
) -> bool:
    """Write a new folder of samples, whole or not at all; False, and nothing is left, where there are no items.

    FileExistsError when `output` exists. found: asked for what the files held, when all items have been read.
    """
    totals = _Totals()
    with suppress(_NoItems), new_directory(output) as folder:
        (folder / SHARDS).mkdir()
        entries: list[ShardEntry] = []
        for shard in _shards(totals.counted(items)):
            entries.append(_write_shard(folder / SHARDS / f"{len(entries):05d}.arrow", shard, tokenizer.vocab_size))
        if not entries:
            raise _NoItems
        manifest = SampleManifest(
            made_as=made_as,
            tokenizer=tokenizer,
            samples_per_item=samples_per_item,
            samples=sum(entry.documents for entry in entries),
            tokens=sum(entry.tokens for entry in entries),
            trained=totals.trained,
            without_target=totals.without_target,
            shards=tuple(entries),
            folders=tuple(FolderEntry(path=path, documents=count) for path, count in totals.folders),
            found=found(),
        )
        (folder / MANIFEST).write_bytes(manifest.serialized())
        return True
    return False


class _NoItems(Exception):
    """There is nothing to write."""


class _Totals:
    def __init__(self) -> None:
        self.trained = self.without_target = 0
        self.folders: list[tuple[str, int]] = []

    def counted(self, items: Iterable[StoredItem]) -> Iterator[StoredItem]:
        for item in items:
            trained = sum(int(np.count_nonzero(sample.weights[1:])) for sample in item.samples)
            self.trained += trained
            self.without_target += not trained
            if not self.folders or self.folders[-1][0] != item.folder:
                self.folders.append((item.folder, 0))
            self.folders[-1] = (item.folder, self.folders[-1][1] + len(item.samples))
            yield item


def _shards(items: Iterable[StoredItem]) -> Iterator[list[StoredItem]]:
    shard: list[StoredItem] = []
    size = 0
    for item in items:
        shard.append(item)
        size += sum(len(sample.tokens) for sample in item.samples)
        if size >= SHARD_TOKENS:
            yield shard
            shard, size = [], 0
    if shard:
        yield shard


def _write_shard(path: Path, items: list[StoredItem], vocab_size: int) -> ShardEntry:
    samples = [sample for item in items for sample in item.samples]
    of_sample = [item for item in items for _ in item.samples]
    weights = np.concatenate([_parts(sample.weights) for sample in samples])
    weights_dtype = np.uint16 if int(weights.max(initial=0)) < 1 << 16 else np.uint32
    tokens = np.concatenate([sample.tokens for sample in samples])
    tokens_dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    sizes = [len(sample.tokens) for sample in samples]
    turn_ends = np.concatenate([sample.turn_ends for sample in samples])
    batch = pa.RecordBatch.from_arrays(
        [
            _lists(tokens.astype(tokens_dtype), sizes),
            _lists(weights.astype(weights_dtype), sizes),
            _lists(turn_ends.astype(np.int32), [len(sample.turn_ends) for sample in samples]),
            pa.array([item.key for item in of_sample], pa.large_string()),
            pa.array([item.digest for item in of_sample], pa.binary(16)),
        ],
        names=["tokens", "weights", "turn_ends", "name", "digest"],
    )
    return write_batch(path, batch, len(tokens), text_bytes=0)


def _parts(weights: NDArray[np.float32]) -> NDArray[np.int64]:
    """Weights in 1,024ths; one above 0 stays above 0."""
    return np.maximum(np.rint(weights * PARTS), weights > 0).astype(np.int64)


def _lists(values: NDArray, sizes: list[int]) -> pa.LargeListArray:
    offsets = np.zeros(len(sizes) + 1, dtype=np.int64)
    np.cumsum(sizes, out=offsets[1:])
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values))


class SampleSource:
    """The samples of a folder. Shards are mapped, and what is read of them checked, when a sample of theirs is first
    read.
    """

    def __init__(self, path: Path, manifest: SampleManifest) -> None:
        self.path, self.manifest = path, manifest
        self.fingerprint = manifest.fingerprint()
        self.n_samples = manifest.samples
        self.n_items = manifest.samples // manifest.samples_per_item
        self._first = [0, *accumulate(entry.documents for entry in manifest.shards)]
        self._folder_end = list(accumulate(folder.documents for folder in manifest.folders))
        self._mapped: dict[int, _Mapped] = {}

    @classmethod
    def open(cls, path: Path) -> "SampleSource":
        """UserError naming the file that is missing or damaged; the content is checked when it is read."""
        source = cls(path, _read_manifest(path))
        for entry in source.manifest.shards:
            check_size(source.shard_path(entry), entry)
        return source

    def verify(self) -> None:
        """Read every shard and check all digests. UserError naming the shard that is damaged."""
        for entry in self.manifest.shards:
            check_content(self.shard_path(entry), entry, self.manifest.tokenizer.vocab_size)

    def shard_path(self, entry: ShardEntry) -> Path:
        """Where a shard of the manifest lies."""
        return self.path / SHARDS / entry.name

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sample, (samples,)."""
        return np.concatenate([lengths(self.shard_path(entry), entry) for entry in self.manifest.shards])

    def sample(self, number: int) -> Sample:
        """Sample `number` of 0..n_samples-1. UserError naming the shard when it is damaged."""
        place, inside = self._place(number)
        shard = self._mapped.get(place) or self._map(place)
        start, stop = shard.starts[inside : inside + 2]
        return Sample(
            tokens=shard.tokens[start:stop].astype(np.int64),
            weights=shard.weights[start:stop].astype(np.float32) / np.float32(PARTS),
            turn_ends=shard.turn_ends[shard.first_turn[inside] : shard.first_turn[inside + 1]].astype(np.int64),
        )

    def origin(self, number: int) -> Origin:
        """The file and row that a sample was made from."""
        place, inside = self._place(number)
        shard = self._mapped.get(place) or self._map(place)
        file, row = split_key(shard.shard.name(inside))
        folder = self.manifest.folders[bisect_right(self._folder_end, number)].path
        return Origin(str(Path(folder, file)) if folder else file, row)

    def items(self) -> Iterator[tuple[str, Origin]]:
        """(shard, file and row) of each item, in order."""
        for number in range(0, self.n_samples, self.manifest.samples_per_item):
            yield self.manifest.shards[self._place(number)[0]].name, self.origin(number)

    def digests(self) -> Iterator[NDArray[np.uint64]]:
        """Half of each sample's digest as a number, shard by shard."""
        for entry in self.manifest.shards:
            digests = text_digests(self.shard_path(entry), entry)
            yield np.ascontiguousarray(digests[:, :8]).view(np.uint64).reshape(-1)

    def _place(self, number: int) -> tuple[int, int]:
        """(shard, sample in it)."""
        if not 0 <= number < self.n_samples:
            raise IndexError(f"sample {number} of {self.path}, which has {self.n_samples}")
        place = bisect_right(self._first, number) - 1
        return place, number - self._first[place]

    def _map(self, place: int) -> "_Mapped":
        entry = self.manifest.shards[place]
        path = self.shard_path(entry)
        shard = Shard(path, entry)
        if int(shard.tokens.max(initial=0)) >= self.manifest.tokenizer.vocab_size:
            raise damaged(path, f"tokens outside the vocabulary of {self.manifest.tokenizer.vocab_size}")
        weights, turns = shard.column("weights"), shard.column("turn_ends")
        mapped = _Mapped(
            shard, shard.tokens, shard.starts, weights.values.to_numpy(), turns.values.to_numpy(),
            turns.offsets.to_numpy(),
        )  # fmt: skip
        self._mapped[place] = mapped
        return mapped


@dataclass(frozen=True)
class _Mapped:
    """A shard's columns, flat; sample i has turn_ends[first_turn[i] : first_turn[i + 1]]."""

    shard: Shard
    tokens: NDArray
    starts: NDArray[np.int64]
    weights: NDArray
    turn_ends: NDArray[np.int32]
    first_turn: NDArray[np.int64]


def _read_manifest(path: Path) -> SampleManifest:
    file = path / MANIFEST
    try:
        fields = json.loads(file.read_bytes())
        stated = fields.pop("digest"), fields.pop("fingerprint")
        manifest = SampleManifest.model_validate(fields)
        whole = stated == (digest_of(fields), manifest.fingerprint())
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file}: damaged manifest ({reason}); remove its folder, and it is made again") from None
    if not whole:
        raise UserError(f"{file}: damaged manifest (its content differs from its digest); remove its folder, and it is "
                        f"made again")  # fmt: skip
    return manifest
