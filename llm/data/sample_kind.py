"""Kinds of data whose rows hold whole samples: raw rows of files become samples, which are stored once, and packed."""

import json
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from llm.atomic import write_file
from llm.data.build import progress
from llm.data.documents import option
from llm.data.formats import shown
from llm.data.found import Inventory, count, found_lines, listed
from llm.data.images import BrokenImage, ImageReader
from llm.data.json_rows import called
from llm.data.kinds import Asked, Kind, Opened, PackingName, cached
from llm.data.labels import LabelsEntry, MaxLength
from llm.data.listing import InputFile, Listing
from llm.data.packed import Packed, Shortened
from llm.data.rows import RowSource
from llm.data.sample import Sample
from llm.data.samples import ImagesEntry, SampleManifest, SampleSource, StoredItem, write_samples
from llm.data.source import MANIFEST, TokenizerEntry
from llm.data.sources import SourceFiles
from llm.data.split import Split, text_digest
from llm.data.tables import RawRow, raw_rows
from llm.errors import UserError
from llm.paths import refuse_unwritable
from llm.tokenizer import Tokenizer

SAMPLES_VERSION = 1  # raise it when the same rows, template and tokenizer would give other samples
VERIFY_TOKENS = 1 << 26
"""Samples of up to so many tokens are verified whole before the run begins; others shard by shard."""
VERIFY_BYTES = 1 << 30
"""The same for what their files take, where images do."""
DROPPED_FIRST = 5
"""Rows left out for their images that a message lists."""


class Content(NamedTuple):
    """What a raw row says. known_by: bytes that are the same wherever the same content stands, in whatever file."""

    known_by: bytes
    samples: Callable[[], tuple[Sample, ...]]
    """Makes the samples of one item of it. UserError saying what is wrong with it."""


class Encoder(Protocol):
    """Makes samples of raw rows."""

    fingerprint: object
    """All that decides the samples besides rows and tokenizer, as JSON can hold it."""

    def read(self, row: Mapping[str, Any]) -> Content:
        """What a row says. UserError, without file and row, saying what is wrong with it."""


@runtime_checkable
class ImageEncoder(Encoder, Protocol):
    """Makes samples of rows that may have images."""

    images: ImageReader | None
    """None where there are none after all."""

    def beside(self, folder: Path) -> "Encoder":
        """The same for rows of a file in this folder."""


@runtime_checkable
class Labelling(Encoder, Protocol):
    """Makes samples with labels."""

    def labels_entry(self) -> LabelsEntry:
        """What is known of the labels so far."""


@runtime_checkable
class Joining(Encoder, Protocol):
    """Makes samples of rows of which several of a file may be one."""

    def joined_rows(self, file: InputFile, where: str) -> Iterator[RawRow]:
        """The rows of a file, each a sample. UserError naming file and row."""


class PackedRows(RowSource, Protocol):
    """Samples as rows."""

    seq_len: int
    source: SampleSource
    max_length: MaxLength

    @property
    def shortened(self) -> Sequence[Shortened]:
        """What was cut or left out."""

    def notes(self) -> list[str]:
        """Lines about how the samples lie in rows, and which do not lie there whole."""

    def listed(self) -> Iterable[Mapping[str, object]]:
        """What was cut or left out, each as its file, row, tokens and those of them that are kept."""


class SampleKind(Kind):
    """What kinds of samples have in common."""

    packings: tuple[PackingName, ...] = ("best_fit", "none")
    target = "lm"
    """What the labels are called."""
    samples_per_item = 1

    columns: tuple[str, ...] = ()
    """Names that `columns` of a source may map to the file's; () for any."""
    several: tuple[str, ...] = ()
    """Those of them that it may map to several of the file's."""

    @abstractmethod
    def encoder(self, files: SourceFiles, asked: Asked) -> Encoder:
        """Makes the samples of a source. UserError naming the key where it cannot."""

    def check(self, files: SourceFiles) -> None:
        kind, spec = f"kind {self.name}", files.spec
        if files.listing is None:
            raise UserError(f"{files.given}: are token shards, which hold text; rows of {kind} come from files of rows")
        for key, given in (("text_field", spec.text_field != "text"), ("separator", spec.separator is not None)):
            if given:
                raise UserError(f"{option(files.key, key)[2:]}: is for text, not for {kind}; see columns")
        for name, column in spec.columns.items():
            key = option(files.key, "columns")[2:]
            if self.columns and name not in self.columns:
                raise UserError(f"{key}.{name}: {kind} has {', '.join(self.columns)}")
            if not isinstance(column, str) and name not in self.several:
                raise UserError(f"{key}.{name}={column}: is one column of {kind}, not a list")
        if spec.augment is not None and self.name != "labelled":
            raise UserError(f"{option(files.key, 'augment')[2:]}={spec.augment}: is for kind labelled, not for {kind}")
        for file in files.listing.files:
            if not file.type.has_rows:
                raise UserError(
                    f"{files.key}={shown(file.path)}: is no file of rows; {kind} is read from .jsonl, .json, .csv, "
                    f".parquet and .arrow"
                )

    def prepare(self, files: SourceFiles, asked: Asked) -> None:
        encoder = self.encoder(files, asked)
        target = self._folder(files, asked, encoder)
        if not (target / MANIFEST).exists():
            self._store(files, asked, encoder, target)
        rows = self.rows(files, asked, SampleSource.open(target))
        if rows.shortened:
            write_file(_list_of(rows), "".join(f"{json.dumps(entry)}\n" for entry in rows.listed()).encode())

    def _store(self, files: SourceFiles, asked: Asked, encoder: Encoder, target: Path) -> None:
        inventory = Inventory()
        listing = _listing(files)
        with suppress(FileExistsError), progress(f"encoding {target.name}", listing.bytes) as move:
            reader = _Reader(files, encoder, asked, inventory)
            made_with = _entry(asked.tokenizer)
            what = (self.name, self.samples_per_item, made_with, target)
            images = None if reader.images is None else reader.images_entry
            labels = encoder.labels_entry if isinstance(encoder, Labelling) else None
            found = reader.items(move), *what, lambda: inventory.found([listing])
            if not write_samples(*found, images=images, labels=labels):
                raise files.nothing(asked.split, "row")

    def look(self, files: SourceFiles, asked: Asked) -> None:
        refuse_unwritable(asked.cache_dir, f"data.cache_dir={asked.cache_dir}")
        reader = _Reader(files, self.encoder(files, asked), asked, Inventory())
        if next(reader.items(lambda done: None), None) is None:
            raise files.nothing(asked.split, "row")

    def open(self, files: SourceFiles, asked: Asked) -> Opened:
        folder = self._folder(files, asked, self.encoder(files, asked))
        if not (folder / MANIFEST).exists():
            raise UserError(
                f"{files.given}: has not been encoded into {folder}; its files changed since this run began, or "
                f"data.cache_dir is another folder on this machine. Start the run again"
            )
        source = SampleSource.open(folder)
        rows = self.rows(files, asked, source)
        lines = self.trained_lines(files.given, source.manifest)
        notes = [*_notes(files, source, asked.split), *lines, *rows.notes()]
        if rows.shortened:
            notes.append(f"{files.given}: file and row of all of these are listed in {_list_of(rows)}")
        return Opened(
            rows,
            given=files.given,
            notes=tuple(notes),
            digests=source.digests,
            verify=source.verify if _is_soon_verified(source) else None,
        )

    def rows(self, files: SourceFiles, asked: Asked, source: SampleSource) -> PackedRows:
        """The samples of a source as rows."""
        return Packed(
            source,
            asked.seq_len,
            0 if asked.held_out else asked.seed,
            target=self.target,
            together=self.packing(asked) == "best_fit",
            max_length=asked.chat.max_length,
            given=files.given,
        )

    def trained_lines(self, given: str, manifest: SampleManifest) -> Iterator[str]:
        """How much of a source trains, for people."""
        none = f"; {count(manifest.without_target, 'row')} without any" if manifest.without_target else ""
        yield (
            f"{given}: {manifest.trained:,} of {count(manifest.tokens, 'token')} are trained on "
            f"({manifest.trained / max(1, manifest.tokens):.1%}){none}"
        )

    def _folder(self, files: SourceFiles, asked: Asked, encoder: Encoder) -> Path:
        """Where its samples belong in the cache: named by the files' paths, sizes and times, which are quick to ask,
        and all else that they depend on.
        """
        listing = _listing(files)
        root, split = listing.path.resolve(), asked.split
        of_files = [
            [
                str(root / file.name if listing.path.is_dir() else root), file.status.st_size, file.status.st_mtime_ns,
                file.type.format, file.type.compression,
            ]
            for file in listing.files
        ]  # fmt: skip
        side = None if split is None else [split.share, split.part]
        columns = sorted(files.spec.columns.items())
        made_by = ["samples", SAMPLES_VERSION, self.name, asked.tokenizer.fingerprint, encoder.fingerprint]
        return cached(files.spec, asked.cache_dir, [*made_by, columns, of_files, side])


class _Reader:
    """The items of a source, in the order of its files."""

    def __init__(self, files: SourceFiles, encoder: Encoder, asked: Asked, inventory: Inventory) -> None:
        self.listing, self.encoder, self.split, self.inventory = _listing(files), encoder, asked.split, inventory
        self.images = encoder.images if isinstance(encoder, ImageEncoder) else None
        self.drops = asked.images.bad == "drop"
        self.dropped: list[str] = []
        """Each row left out for its images, and what is wrong with it."""

    def images_entry(self) -> ImagesEntry:
        """What is known of the images so far."""
        assert self.images is not None
        first = tuple(self.dropped[:DROPPED_FIRST])
        return self.images.entry().model_copy(update={"dropped": len(self.dropped), "dropped_first": first})

    def items(self, move: Callable[[int], None]) -> Iterator[StoredItem]:
        """All items on this side of the split; `move` gets the bytes of all files read so far. UserError naming file
        and row.
        """
        before = 0
        for file in self.listing.files:
            self.inventory.begin_file(file)
            where = f"{self.listing.key}={shown(file.path)}"
            items = trained = 0
            encoder = self.encoder.beside(file.path.parent) if isinstance(self.encoder, ImageEncoder) else self.encoder
            rows = encoder.joined_rows(file, where) if isinstance(encoder, Joining) else raw_rows(file, where)
            for row in rows:
                item = self._item(encoder, file, row, f"{where}, {row.place}")
                move(before + row.consumed)
                if item is not None:
                    self.inventory.add(is_empty=False)
                    items += 1
                    trained += any(sample.n_targets > 0 for sample in item.samples)
                    yield item
            if items and not trained and (self.split is None or self.split.part == "train"):
                what = "label" if isinstance(encoder, Labelling) else "token"
                raise UserError(f"{where}: no {what} to train on in its {count(items, 'row')}")
            before += file.status.st_size

    def _item(self, encoder: Encoder, file: InputFile, row: RawRow, where: str) -> StoredItem | None:
        if not isinstance(row.value, Mapping):
            raise UserError(f"{where}: is {called(row.value)}, where an object with columns must be")
        try:
            content = encoder.read(row.value)
            digest = text_digest(content.known_by)
            if self.split is not None and not self.split.keeps(digest):
                return None
            samples = content.samples()
            if not all(len(sample.tokens) for sample in samples):
                raise UserError("has no tokens")
        except UnicodeEncodeError:
            raise UserError(f"{where}: a text of it has a lone surrogate, which is no character") from None
        except BrokenImage as error:
            if not self.drops:
                hint = "data.bad_images=drop leaves such rows out"
                raise UserError(f"{where}: {error}; {hint}") from None
            self.dropped.append(f"{where}: {error}")
            return None
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        return StoredItem(samples, f"{file.name}:{row.number}", str(file.folder.absolute()), digest)


def _is_soon_verified(source: SampleSource) -> bool:
    manifest = source.manifest
    return manifest.tokens <= VERIFY_TOKENS and sum(entry.file_bytes for entry in manifest.shards) <= VERIFY_BYTES


def _list_of(rows: PackedRows) -> Path:
    """Where the samples that do not lie whole in rows of a length are listed."""
    return rows.source.path / f"longer_than_{rows.seq_len}_{rows.max_length}.jsonl"


def first_row(files: SourceFiles) -> Mapping[str, Any] | None:
    """The first raw row of a source that is an object; None where its files have none."""
    listing = _listing(files)
    for file in listing.files:
        for row in raw_rows(file, f"{listing.key}={shown(file.path)}"):
            if isinstance(row.value, Mapping):
                return row.value
    return None


def _listing(files: SourceFiles) -> Listing:
    assert files.listing is not None  # `check` refuses token shards
    return files.listing


def _entry(tokenizer: Tokenizer) -> TokenizerEntry:
    return TokenizerEntry(
        kind=tokenizer.kind,
        fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
    )


def _notes(files: SourceFiles, source: SampleSource, split: Split | None) -> Iterator[str]:
    manifest = source.manifest
    if split is not None and split.part == "valid":
        yield f"data.valid={split.share}: {count(source.n_items, 'row')} of {files.given} held out"
    else:
        now = listed([_listing(files)])
        keep = ("left_out", "left_out_more", "repeated")  # may change while the files that are read do not
        update = {key: getattr(now, key) for key in keep}
        found = now if manifest.found is None else manifest.found.model_copy(update=update)
        yield from found_lines(files.given, found, source.n_items, option(files.key, "separator"), noun="row")
        yield from files.warnings()
    if manifest.images is not None:
        images = manifest.images
        yield f"{files.given}: images cut into {count(images.tiles, 'tile')} of {images.tokens_per_tile} tokens each"
        if images.dropped:
            more = "; ..." if images.dropped > len(images.dropped_first) else ""
            yield (
                f"{files.given}: {count(images.dropped, 'row')} left out for an image that is missing or broken "
                f"(data.bad_images=drop): {'; '.join(images.dropped_first)}{more}"
            )
