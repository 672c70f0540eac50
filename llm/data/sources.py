"""The `data:` section of a run config turned into opened token sources; raw text is sharded into a cache first.

The two steps are apart so that a run needs no lock: one process calls `prepare_data`, all wait at a barrier, then
everyone calls `open_data`. Should two runs prepare the same text at once, both do the work and the faster one's folder
stays.
"""

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from llm.data.build import NoDocuments, build_source, write_source
from llm.data.documents import Reading, option, read_listings
from llm.data.formats import FileType, shown
from llm.data.found import Inventory, count, found_lines, listed
from llm.data.listing import Identity, Listing, list_input
from llm.data.reshard import placed_documents
from llm.data.source import MANIFEST, SHARDS, TokenSource, is_source
from llm.data.split import Split, text_digest
from llm.errors import UserError
from llm.paths import PathText, refuse_unwritable
from llm.tokenizer import Tokenizer

CACHE_VERSION = 1  # raise it when the same text and tokenizer would give other shards
LONG_WORK_BYTES = 1 << 26
"""Text from which on its files are said before it is sharded, not only when the run begins."""
MOST_OF_NAME = 100
MOST_BYTES_OF_NAME = 200


class SourceSpec(BaseModel):
    """One source of a mixture, as it stands under `data.train` or `data.valid`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    path: PathText = Field(min_length=1)
    """a source folder made by tools/shard.py, or raw text: a file or a folder of .txt, .md, source code, .jsonl,
    .ndjson, .json, .csv, .parquet, .arrow; text, JSON and CSV also with .gz, .bz2, .xz or .zst behind"""
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """share of the rows, relative to the other sources"""
    name: str = ""
    """decides the order of this source's rows (letters, digits, . _ -); empty: the path's last part without endings"""
    text_field: str = "text"
    """column of JSON, CSV, Parquet and Arrow rows that holds the text"""
    separator: str | None = Field(default=None, min_length=1)
    """what ends a document in text files, as <|endoftext|>, and is no part of it; null: each text file is one"""

    @field_validator("name")
    @classmethod
    def _is_a_name(cls, name: str) -> str:
        known = all(letter.isalnum() or letter in "._-" for letter in name) and name not in (".", "..")
        if not known or len(name) > MOST_OF_NAME or len(name.encode(errors="replace")) > MOST_BYTES_OF_NAME:
            raise PydanticCustomError(
                "source_name",
                "a name has at most {most} letters, digits, . _ and -; it is no path",
                {"most": MOST_OF_NAME},
            )
        return name

    def resolved_name(self) -> str:
        """The name, or the one made from the path, in which what cannot be printed is written as _."""
        last = Path(self.path).name or Path(self.path).absolute().name or "data"
        made = last.split(".")[0] or last
        return self.name or "".join(letter if letter.isprintable() else "_" for letter in made)

    def cache_name(self) -> str:
        """What its folders in the cache begin with."""
        return self.resolved_name().encode()[:MOST_BYTES_OF_NAME].decode(errors="ignore")


DataSpec = str | Path | Sequence[SourceSpec]
"""What `data.train` may be, and `data.valid` besides a share of the training documents."""


@dataclass(frozen=True)
class Side:
    """The text that is trained on, or held out. key: the config's; elsewhere: text of the other side, whose files are
    not read here; split: only a share of the documents of `data`.
    """

    key: str
    data: DataSpec
    elsewhere: DataSpec | None = None
    split: Split | None = None


def sides(train: DataSpec, valid: DataSpec | float | None) -> dict[str, Side]:
    """What to open for a run, by `data.train` and `data.valid`, in the order in which to prepare it: a share of the
    documents can turn out to hold nothing, so it comes before the long work.
    """
    if isinstance(valid, float):
        return {
            "data.valid": Side("data.train", train, split=Split(valid, "valid")),
            "data.train": Side("data.train", train, split=Split(valid, "train")),
        }
    found = {"data.train": Side("data.train", train, elsewhere=valid)}
    return found if valid is None else {**found, "data.valid": Side("data.valid", valid)}


def source_specs(data: DataSpec) -> list[SourceSpec]:
    """The list form of a `data` entry; a path alone is one source."""
    return [SourceSpec(path=str(data))] if isinstance(data, str | Path) else list(data)


def check_data(data: DataSpec | Side, *, key: str = "data.train", cache_dir: str | Path | None = None) -> None:
    """UserError naming `key` and the path where there is nothing to read; looks at names only."""
    for _ in _sources(_side(data, key), cache_dir):
        pass


def prepare_data(
    data: DataSpec | Side, tokenizer: Tokenizer, cache_dir: str | Path, *, key: str = "data.train", threads: int = 1
) -> None:
    """Shard the raw text among `data` into `cache_dir`, unless it is there already. Shows progress. UserError names
    `key` and the file.
    """
    side = _side(data, key)
    for source in _sources(side, cache_dir):
        target = source.folder(tokenizer, Path(cache_dir), side.split)
        if target is None or is_source(target):
            continue
        with suppress(FileExistsError):  # another run prepared the same text meanwhile
            try:
                source.build(tokenizer, target, side.split, threads)
            except NoDocuments:
                raise source.nothing(side.split) from None


def check_text(side: Side, tokenizer: Tokenizer, cache_dir: str | Path) -> None:
    """UserError naming key and file where a source has no text, or cannot be read up to its first one; nothing is
    written.
    """
    for source in _sources(side, cache_dir):
        if source.listing is None:
            source.open(tokenizer, Path(cache_dir), None, verify=False)
            continue
        refuse_unwritable(Path(cache_dir), f"data.cache_dir={cache_dir}")
        reading, split, empty = Reading(source.spec.text_field, source.spec.separator), side.split, 0
        for document in read_listings([source.listing], reading):
            if split is not None and not split.keeps(text_digest(document.text.encode())):
                continue
            if document.text:
                break
            empty += 1
        else:
            raise source.empty(empty) if empty else source.nothing(split)


def open_data(
    data: DataSpec | Side,
    tokenizer: Tokenizer,
    cache_dir: str | Path,
    *,
    key: str = "data.train",
    verify: bool = False,
) -> list[tuple[str, TokenSource, float]]:
    """(name, source, weight) of all of `data`, ready for `Mixture`. Raw text must have been prepared.

    UserError names `key` and the file: missing, damaged, or made with another tokenizer. `verify` reads every shard
    whole.
    """
    side = _side(data, key)
    return [
        (source.spec.resolved_name(), source.open(tokenizer, Path(cache_dir), side.split, verify), source.spec.weight)
        for source in _sources(side, cache_dir)
    ]


@dataclass(frozen=True)
class _SourceFiles:
    """A source and what it is read from: the listed files, or a folder of shards where `listing` is None."""

    spec: SourceSpec
    key: str
    listing: Listing | None

    @property
    def given(self) -> str:
        return f"{self.key}={shown(self.spec.path)}"

    def folder(self, tokenizer: Tokenizer, cache_dir: Path, split: Split | None) -> Path | None:
        """Where it belongs in the cache: named by the files' paths, sizes and times, which are quick to ask. None for
        shards that are read where they are.
        """
        more: dict[str, object] = {}
        if split is not None:
            more["split"] = [split.share, split.part]
        if self.listing is None:
            if split is None:
                return None
            fingerprint = TokenSource.open(self.spec.path).fingerprint
            return self._cached(cache_dir, [CACHE_VERSION, tokenizer.fingerprint, fingerprint, more])
        root = self.listing.path.resolve()
        places = [(root / file.name if self.listing.path.is_dir() else root, file) for file in self.listing.files]
        files = [(str(place), file.status.st_size, file.status.st_mtime_ns) for place, file in places]
        readings = {
            str(place): [file.type.format, file.type.compression]
            for place, file in places
            if not _read_as_ever(place.name, file.type)
        }
        if readings:
            more["readings"] = readings
        if self.spec.separator is not None:
            more["separator"] = self.spec.separator
        parts: list[object] = [CACHE_VERSION, tokenizer.fingerprint, self.spec.text_field, files]
        return self._cached(cache_dir, [*parts, more] if more else parts)

    def _cached(self, cache_dir: Path, parts: list[object]) -> Path:
        digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=12).hexdigest()
        return cache_dir / f"{self.spec.cache_name()}-{digest}"

    def build(self, tokenizer: Tokenizer, target: Path, split: Split | None, threads: int) -> None:
        """Shard it into `target`."""
        if self.listing is None:
            assert split is not None
            whole = TokenSource.open(self.spec.path)
            self._check_tokenizer(whole, tokenizer)
            found = whole.manifest.found
            documents = placed_documents(whole, split)
            write_source(documents, whole.manifest.tokenizer, target, found=None if found is None else lambda: found)
            return
        if self.listing.bytes >= LONG_WORK_BYTES:
            for line in self._lines_before():
                print(line, file=sys.stderr, flush=True)
        inventory = Inventory()
        reading = Reading(self.spec.text_field, self.spec.separator)
        build_source(
            read_listings([self.listing], reading, inventory),
            tokenizer,
            target,
            total_bytes=self.listing.bytes,
            threads=threads,
            name=self.given,
            split=split,
            found=lambda: inventory.found([self.listing] if self.listing else []),
        )

    def nothing(self, split: Split | None) -> UserError:
        """The error where there are no documents."""
        if split is None:
            return UserError(f"{self.given}: has no documents")
        what = "none is held out" if split.part == "valid" else "all are held out"
        return UserError(
            f"data.valid={split.share}: of the documents of {self.given} {what}; give another share, the files to hold "
            f"out, or for text files {option(self.key, 'separator')}"
        )

    def empty(self, n_docs: int) -> UserError:
        """The error where documents have no text: nothing can be learnt from them, and a loss over them is 0."""
        what = "its only document is empty" if n_docs == 1 else f"all its {n_docs:,} documents are empty"
        if self.listing is None or not any(file.type.has_rows for file in self.listing.files):
            return UserError(f"{self.given}: {what}")
        field = option(self.key, "text_field")
        return UserError(f"{self.given}: {what}; text was read from {field}={self.spec.text_field}")

    def open(self, tokenizer: Tokenizer, cache_dir: Path, split: Split | None, verify: bool) -> TokenSource:
        """The opened source, with its notes."""
        folder = self.folder(tokenizer, cache_dir, split)
        if folder is not None and not (folder / MANIFEST).exists():
            raise UserError(
                f"{self.given}: has not been sharded into {folder}; its files changed since this run began, or "
                f"data.cache_dir is another folder on this machine. Start the run again"
            )
        source = TokenSource.open(folder or self.spec.path, verify=verify)
        self._check_tokenizer(source, tokenizer)
        if source.n_bytes == 0 or source.n_tokens <= source.n_docs:
            raise self.empty(source.n_docs)
        source.given, source.given_as_shards = self.given, self.listing is None
        source.notes = tuple(self._notes(source, split))
        return source

    def _check_tokenizer(self, source: TokenSource, tokenizer: Tokenizer) -> None:
        if source.tokenizer_fingerprint != tokenizer.fingerprint:
            made_with = source.manifest.tokenizer
            raise UserError(
                f"{self.given}: made with another tokenizer ({made_with.kind}, {made_with.vocab_size} ids, "
                f"{made_with.fingerprint}) than this run's ({tokenizer.kind}, {tokenizer.vocab_size} ids, "
                f"{tokenizer.fingerprint}); shard the text again with tools/shard.py"
            )

    def _lines_before(self) -> Iterator[str]:
        assert self.listing is not None
        yield from found_lines(self.given, listed([self.listing]), None, option(self.key, "separator"))

    def _notes(self, source: TokenSource, split: Split | None) -> Iterator[str]:
        if split is not None and split.part == "valid":
            yield f"data.valid={split.share}: {count(source.n_docs, 'document')} of {self.given} held out"
            return
        found = source.manifest.found
        given = self.given
        documents: int | None = source.n_docs if split is None else None
        if self.listing is None:
            yield f"{given}: token shards of {count(source.n_docs, 'document')}, {count(source.n_tokens, 'token')}"
            given += " was made of"
        else:
            now = listed([self.listing])
            keep = ("left_out", "left_out_more", "repeated")  # may change while the files that are read do not
            found = now if found is None else found.model_copy(update={key: getattr(now, key) for key in keep})
        if found is not None:
            if split is not None and all(entry.documents is not None for entry in found.endings):
                documents = sum(entry.documents or 0 for entry in found.endings)
            yield from found_lines(given, found, documents, option(self.key, "separator"))
        held_out = self.listing.named_held_out() if self.listing and self.key.startswith("data.train") else []
        if held_out:
            others = f" and {count(len(held_out) - 1, 'more file')}" if len(held_out) > 1 else ""
            yield (
                f"{self.given}: warning: {shown(held_out[0])}{others}, by the name not for training, is trained on; "
                f"give the training files alone, or these to data.valid"
            )
        if split is not None:
            yield f"{self.given}: {count(source.n_docs, 'document')} to train on, the others held out"


def _side(data: DataSpec | Side, key: str) -> Side:
    return data if isinstance(data, Side) else Side(key, data)


def _sources(side: Side, cache_dir: str | Path | None) -> list[_SourceFiles]:
    sources = _listed(side.key, side.data, cache_dir)
    if side.elsewhere is None:
        return sources
    others = _listed("data.valid", side.elsewhere, cache_dir)
    native = {Path(other.spec.path).resolve() for other in others if other.listing is None}
    elsewhere: dict[Identity, str] = {
        file.identity: "held out, data.valid" for other in others if other.listing for file in other.listing.files
    }
    kept = []
    for source in sources:
        if source.listing is None:
            if Path(source.spec.path).resolve() in native:
                raise UserError(
                    f"{source.given}: is data.valid too; hold out other text, or a share: --data.valid=0.05"
                )
            kept.append(source)
            continue
        listing = source.listing.without(elsewhere)
        if not listing.files:
            raise UserError(
                f"{source.given}: all its files are in data.valid too, so nothing is left to train on; hold out other "
                f"files, or a share of the documents: --data.valid=0.05"
            )
        kept.append(_SourceFiles(source.spec, source.key, listing))
    return kept


def _listed(key: str, data: DataSpec, cache_dir: str | Path | None) -> list[_SourceFiles]:
    specs = source_specs(data)
    sources = []
    for number, spec in enumerate(specs):
        own = key if len(specs) == 1 or key.startswith("--") else f"{key}.{number}.path"
        path = Path(spec.path)
        listing = None if _is_native(path, own) else list_input(path, own, cache_dir)
        if listing is not None and spec.separator is not None and all(file.type.has_rows for file in listing.files):
            raise UserError(
                f"{option(own, 'separator')[2:]}={spec.separator!r}: is for text files, and {listing.given} has none"
            )
        sources.append(_SourceFiles(spec, own, listing))
    return sources


def _is_native(path: Path, key: str) -> bool:
    if is_source(path):
        return True
    if (path / SHARDS).is_dir():
        raise UserError(
            f"{key}={shown(path)}: has shards but no manifest.json, so it is not a whole source; "
            f"make it again with tools/shard.py"
        )
    return False


def _read_as_ever(name: str, type: FileType) -> bool:
    """Whether version 1 of the cache, which knew few endings, read a file of that name in the same way."""
    if name.endswith((".jsonl", ".jsonl.gz")):
        return type.format == "lines" and type.compression == ("gz" if name.endswith(".gz") else "")
    return type.format == ("parquet" if name.endswith(".parquet") else "text") and not type.compression
