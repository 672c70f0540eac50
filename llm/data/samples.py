"""Samples on disk: a folder with `manifest.json` and `shards/*.arrow` of what trains as a whole, in tokens, with the
weights of the targets beside them. Made once from raw rows, whatever the length of the rows that a run packs them into.

A shard has the columns tokens, weights (in 1,024ths, so that their sums are exact), turn_ends, name (file and row) and
digest (of the content that the sample was made from); where rows may have images, tiles (bytes of (n, 3, S, S)) and
tiles_crc32 too, so that a sample is checked without reading the others; where samples have labels, labels; where they
are of values, features. An item is what is packed as one: a sample, or the samples of a pair, which follow one another.

Shapes: n tokens of a sample, L labels of one, S pixels a side of a tile.
"""

import hashlib
import json
import zlib
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
from llm.data.labels import LabelsEntry
from llm.data.rows import Origin
from llm.data.sample import Sample
from llm.data.shards import (
    Shard,
    ShardEntry,
    check_content,
    check_size,
    damaged,
    large_sizes,
    lengths,
    text_digests,
    write_batch,
)
from llm.data.source import MANIFEST, SHARDS, FolderEntry, TokenizerEntry
from llm.errors import UserError

PARTS = 1024
"""Weights are kept in this part of 1."""
SHARD_TOKENS = 1 << 22
SHARD_TILE_BYTES = 1 << 27
"""A shard is closed where its tiles have grown to this: so much of them is in memory while they are written."""


class ImagesEntry(BaseModel):
    """What the manifest says of images."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_size: int
    """S"""
    tokens_per_tile: int
    patch_token_id: int
    """The token of a slot."""
    tiles: int = 0
    dropped: int = 0
    """Rows that were left out for an image that is missing or broken (data.bad_images=drop)."""
    dropped_first: tuple[str, ...] = ()
    """The first of them, and what is wrong with each."""


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
    """Tokens, or labels, that are targets."""
    without_target: int
    """Items that have none."""
    shards: tuple[ShardEntry, ...]
    folders: tuple[FolderEntry, ...] = ()
    """Where the names of the samples start from."""
    found: Found | None = None
    """What the files held and what was left out."""
    images: ImagesEntry | None = None
    """None where rows have no images: the fingerprint is then that of a manifest which knows of none."""
    labels: LabelsEntry | None = None
    """None where tokens are predicted; the same holds then."""
    features: int | None = None
    """Values of a position; None where samples are of tokens; the same holds then."""

    def fingerprint(self) -> str:
        """Hex digest of everything but `folders`, `found` and which rows were dropped: the same samples give the same
        one, wherever they lay.
        """
        images = True if self.images is None else {"dropped", "dropped_first"}
        exclude = {"folders": True, "found": True, "images": images}
        exclude |= {name: True for name in ("labels", "features") if getattr(self, name) is None}
        return digest_of(self.model_dump(mode="json", exclude=exclude))

    def serialized(self) -> bytes:
        """The content of manifest.json: the fields, and a digest of all of them."""
        absent = {name for name in ("images", "labels", "features") if getattr(self, name) is None}
        fields = self.model_dump(mode="json", exclude=absent or None)
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
    images: Callable[[], ImagesEntry] | None = None,
    labels: Callable[[], LabelsEntry] | None = None,
) -> bool:
    """Write a new folder of samples, whole or not at all; False, and nothing is left, where there are no items.

    FileExistsError when `output` exists. found: asked for what the files held, when all items have been read; images:
    asked before, and then again, where samples may have images; labels: asked when all items have been read, where
    samples have labels. ValueError where the slots of a sample are not those of its tiles.
    """
    asked = None if images is None else images()
    totals = _Totals(asked)
    with suppress(_NoItems), new_directory(output) as folder:
        (folder / SHARDS).mkdir()
        entries: list[ShardEntry] = []
        for shard in _shards(totals.counted(items)):
            path = folder / SHARDS / f"{len(entries):05d}.arrow"
            entries.append(_write_shard(path, shard, tokenizer.vocab_size, asked))
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
            images=None if images is None else images().model_copy(update={"tiles": totals.tiles}),
            labels=None if labels is None else labels(),
            features=totals.features,
        )
        (folder / MANIFEST).write_bytes(manifest.serialized())
        return True
    return False


class _NoItems(Exception):
    """There is nothing to write."""


class _Totals:
    def __init__(self, images: ImagesEntry | None) -> None:
        self.images = images
        self.trained = self.without_target = self.tiles = 0
        self.features: int | None = None
        self.folders: list[tuple[str, int]] = []

    def counted(self, items: Iterable[StoredItem]) -> Iterator[StoredItem]:
        for item in items:
            trained = sum(sample.n_targets for sample in item.samples)
            self.trained += trained
            self.without_target += not trained
            self.tiles += sum(_tiles(sample, self.images) for sample in item.samples)
            if (features := item.samples[0].features) is not None:
                self.features = features.shape[1]
            if not self.folders or self.folders[-1][0] != item.folder:
                self.folders.append((item.folder, 0))
            self.folders[-1] = (item.folder, self.folders[-1][1] + len(item.samples))
            yield item


def _tiles(sample: Sample, images: ImagesEntry | None) -> int:
    """Tiles of a sample. ValueError where its slots are not theirs."""
    tiles = 0 if sample.images is None else len(sample.images)
    slots = 0 if images is None else int(np.count_nonzero(sample.tokens == images.patch_token_id))
    if tiles and images is None:
        raise ValueError("a sample has images, and nothing is known of them")
    if images is not None and slots != tiles * images.tokens_per_tile:
        raise ValueError(f"{slots} slots for {tiles} tiles of {images.tokens_per_tile} each")
    return tiles


def _shards(items: Iterable[StoredItem]) -> Iterator[list[StoredItem]]:
    shard: list[StoredItem] = []
    size = tile_bytes = 0
    for item in items:
        shard.append(item)
        size += sum(len(sample.tokens) for sample in item.samples)
        tile_bytes += sum(0 if sample.images is None else sample.images.nbytes for sample in item.samples)
        if size >= SHARD_TOKENS or tile_bytes >= SHARD_TILE_BYTES:
            yield shard
            shard, size, tile_bytes = [], 0, 0
    if shard:
        yield shard


def _write_shard(path: Path, items: list[StoredItem], vocab_size: int, images: ImagesEntry | None) -> ShardEntry:
    samples = [sample for item in items for sample in item.samples]
    of_sample = [item for item in items for _ in item.samples]
    weights = np.concatenate([_parts(sample.weights) for sample in samples])
    weights_dtype = np.uint16 if int(weights.max(initial=0)) < 1 << 16 else np.uint32
    tokens = np.concatenate([sample.tokens for sample in samples])
    tokens_dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    sizes = [len(sample.tokens) for sample in samples]
    turn_ends = np.concatenate([sample.turn_ends for sample in samples])
    columns: dict[str, pa.Array] = {
        "tokens": _lists(tokens.astype(tokens_dtype), sizes),
        "weights": _lists(weights.astype(weights_dtype), sizes),
        "turn_ends": _lists(turn_ends.astype(np.int32), [len(sample.turn_ends) for sample in samples]),
        "name": pa.array([item.key for item in of_sample], pa.large_string()),
        "digest": pa.array([item.digest for item in of_sample], pa.binary(16)),
    }
    if images is not None:
        tiles = [b"" if sample.images is None else sample.images.tobytes() for sample in samples]
        columns["tiles"] = pa.array(tiles, pa.large_binary())
        columns["tiles_crc32"] = pa.array([zlib.crc32(content) for content in tiles], pa.uint32())
    if (labels := [sample.labels for sample in samples if sample.labels is not None]):
        columns["labels"] = _lists(np.concatenate(labels), [len(of_sample) for of_sample in labels])
    if (features := [sample.features for sample in samples if sample.features is not None]):
        columns["features"] = _lists(np.concatenate(features).reshape(-1), [of.size for of in features])
    if samples[0].text is not None:
        columns["text"] = pa.array([sample.text for sample in samples], pa.large_string())
    batch = pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns))
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

    def tiles(self) -> NDArray[np.int64]:
        """Tiles of each sample, (samples,)."""
        images = self.manifest.images
        if images is None:
            return np.zeros(self.n_samples, dtype=np.int64)
        sizes = [large_sizes(self.shard_path(entry), entry, "tiles") for entry in self.manifest.shards]
        return np.concatenate(sizes) // (3 * images.image_size**2)

    def sample(self, number: int) -> Sample:
        """Sample `number` of 0..n_samples-1. UserError naming the shard when it is damaged."""
        place, inside = self._place(number)
        shard = self._mapped.get(place) or self._map(place)
        start, stop = shard.starts[inside : inside + 2]
        return Sample(
            tokens=shard.tokens[start:stop].astype(np.int64),
            weights=shard.weights[start:stop].astype(np.float32) / np.float32(PARTS),
            turn_ends=shard.turn_ends[shard.first_turn[inside] : shard.first_turn[inside + 1]].astype(np.int64),
            images=None if shard.tiles is None else shard.tiles.of(inside),
            labels=None if shard.labels is None else shard.labels[inside],
            features=None if shard.features is None else shard.features[start:stop],
            text=None if shard.texts is None else str(shard.texts[inside].as_py()),
        )

    def features(self, number: int) -> NDArray[np.float32]:
        """The values of sample `number`, (n, F), mapped. UserError naming the shard when it is damaged."""
        place, inside = self._place(number)
        shard = self._mapped.get(place) or self._map(place)
        assert shard.features is not None
        start, stop = shard.starts[inside : inside + 2]
        return shard.features[start:stop]

    def labels(self) -> NDArray[np.float32]:
        """The labels of all samples as they are stored, (samples, L). UserError naming the shard that is damaged."""
        shards = (self._mapped.get(place) or self._map(place) for place in range(len(self.manifest.shards)))
        return np.concatenate([shard.labels for shard in shards if shard.labels is not None])

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
        labels, width = self.manifest.labels, self.manifest.features
        mapped = _Mapped(
            shard, shard.tokens, shard.starts, weights.values.to_numpy(), turns.values.to_numpy(),
            turns.offsets.to_numpy(),
            None if self.manifest.images is None else _Tiles(shard, self.manifest.images.image_size),
            None if labels is None else shard.column("labels").values.to_numpy().reshape(-1, len(labels.names)),
            None if labels is None or not labels.with_text else shard.column("text"),
            None if width is None else shard.column("features").values.to_numpy().reshape(-1, width),
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
    tiles: "_Tiles | None"
    labels: NDArray[np.float32] | None
    """(samples, L)"""
    texts: pa.Array | None
    features: NDArray[np.float32] | None
    """(tokens, F)"""


class _Tiles:
    """The tiles of a shard's samples: mapped, so that those of other samples stay on disk."""

    def __init__(self, shard: Shard, side: int) -> None:
        self._path, self._side = shard.path, side
        self._offsets, self._content = shard.large_column("tiles")
        self._crc32: NDArray[np.uint32] = shard.column("tiles_crc32").to_numpy()
        self._is_checked = np.zeros(len(self._crc32), dtype=bool)

    def of(self, sample: int) -> NDArray[np.uint8] | None:
        """(n, 3, S, S), None without images. UserError naming the shard where they are damaged."""
        content = self._content[self._offsets[sample] : self._offsets[sample + 1]]
        if not self._is_checked[sample]:
            if zlib.crc32(content.data) != self._crc32[sample] or len(content) % (3 * self._side**2):
                raise damaged(self._path, f"the tiles of sample {sample} differ from their crc32")
            self._is_checked[sample] = True
        return content.reshape(-1, 3, self._side, self._side) if len(content) else None


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
