"""Text: documents in token shards, which a run reads as one stream cut into rows.

Raw text is sharded into a cache first. The two steps are apart so that a run needs no lock: one process prepares, all
wait at a barrier, then everyone opens. Should two runs prepare the same text at once, both do the work and the faster
one's folder stays.
"""

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llm.data.build import NoDocuments, build_source, write_source
from llm.data.documents import Reading, option, read_listings
from llm.data.formats import FileType
from llm.data.found import Inventory, count, found_lines, listed
from llm.data.kinds import Asked, Kind, Opened, cached, register
from llm.data.reshard import placed_documents
from llm.data.shards import text_digests
from llm.data.source import MANIFEST, TokenSource, is_source
from llm.data.sources import DataSpec, Side, SourceFiles, source_files
from llm.data.split import Split, text_digest
from llm.data.stream import Stream
from llm.errors import UserError
from llm.paths import refuse_unwritable
from llm.tokenizer import Tokenizer

CACHE_VERSION = 1  # raise it when the same text and tokenizer would give other shards
LONG_WORK_BYTES = 1 << 26
"""Text from which on its files are said before it is sharded, not only when the run begins."""
VERIFY_TOKENS = 1 << 28
"""A source up to this size is verified whole before the run begins (under a second); a larger one shard by shard as
it is first read.
"""


def prepare_data(
    data: DataSpec | Side, tokenizer: Tokenizer, cache_dir: str | Path, *, key: str = "data.train", threads: int = 1
) -> None:
    """Shard the raw text among `data` into `cache_dir`, unless it is there already. Shows progress. UserError names
    `key` and the file.
    """
    for source, split in _texts(data, cache_dir, key):
        source.prepare(tokenizer, Path(cache_dir), split, threads)


def open_data(
    data: DataSpec | Side,
    tokenizer: Tokenizer,
    cache_dir: str | Path,
    *,
    key: str = "data.train",
    verify: bool = False,
) -> list[tuple[str, TokenSource, float]]:
    """(name, token source, weight) of all of `data`. Raw text must have been prepared.

    UserError names `key` and the file: missing, damaged, or made with another tokenizer. `verify` reads every shard
    whole.
    """
    return [
        (source.spec.resolved_name(), source.open(tokenizer, Path(cache_dir), split, verify), source.spec.weight)
        for source, split in _texts(data, cache_dir, key)
    ]


def _texts(data: DataSpec | Side, cache_dir: str | Path, key: str) -> list[tuple["TextFiles", Split | None]]:
    split = data.split if isinstance(data, Side) else None
    return [(TextFiles.of(source), split) for source in source_files(data, cache_dir, key=key)]


class Text(Kind):
    """A stream of text. A run's rows hold the whole ones of train.seq_len tokens; a validation's also the rest."""

    name = "text"
    packings = ("concat",)

    def check(self, files: SourceFiles) -> None:
        if files.spec.columns:
            field = option(files.key, "text_field")[2:]
            raise UserError(f"{option(files.key, 'columns')[2:]}: is for other kinds; the column of a text is {field}")
        if files.spec.augment is not None:
            raise UserError(f"{option(files.key, 'augment')[2:]}={files.spec.augment}: is for kind labelled, not for "
                            f"kind text")  # fmt: skip

    def prepare(self, files: SourceFiles, asked: Asked) -> None:
        TextFiles.of(files).prepare(asked.tokenizer, asked.cache_dir, asked.split, asked.threads)

    def look(self, files: SourceFiles, asked: Asked) -> None:
        TextFiles.of(files).look(asked.tokenizer, asked.cache_dir, asked.split)

    def open(self, files: SourceFiles, asked: Asked) -> Opened:
        source = TextFiles.of(files).open(asked.tokenizer, asked.cache_dir, asked.split, verify=False)

        def verify() -> None:
            TokenSource.open(source.path, verify=True)

        return Opened(
            Stream(source, asked.seq_len, to_the_end=asked.held_out),
            given=source.given,
            notes=source.notes,
            digests=lambda: digests(source),
            given_whole=source.given_as_shards,
            verify=verify if source.n_tokens <= VERIFY_TOKENS else None,
        )


def digests(source: TokenSource) -> Iterator[NDArray[np.uint64]]:
    """Half of each document's digest as a number, shard by shard: in 2^32 documents two may share one."""
    for entry in source.manifest.shards:
        found = text_digests(source.shard_path(entry), entry)
        yield np.ascontiguousarray(found[:, :8]).view(np.uint64).reshape(-1)


@dataclass(frozen=True)
class TextFiles(SourceFiles):
    """A source of text and its files."""

    @classmethod
    def of(cls, files: SourceFiles) -> "TextFiles":
        """The same files, as text."""
        return cls(files.spec, files.key, files.listing)

    def prepare(self, tokenizer: Tokenizer, cache_dir: Path, split: Split | None, threads: int) -> None:
        """Shard it into the cache, unless it is there already."""
        target = self.folder(tokenizer, cache_dir, split)
        if target is None or is_source(target):
            return
        with suppress(FileExistsError):  # another run prepared the same text meanwhile
            try:
                self.build(tokenizer, target, split, threads)
            except NoDocuments:
                raise self.nothing(split) from None

    def look(self, tokenizer: Tokenizer, cache_dir: Path, split: Split | None) -> None:
        """UserError naming key and file where there is no text, or it cannot be read up to its first one; nothing is
        written.
        """
        if self.listing is None:
            self.open(tokenizer, cache_dir, None, verify=False)
            return
        refuse_unwritable(cache_dir, f"data.cache_dir={cache_dir}")
        reading, empty = Reading(self.spec.text_field, self.spec.separator), 0
        for document in read_listings([self.listing], reading):
            if split is not None and not split.keeps(text_digest(document.text.encode())):
                continue
            if document.text:
                break
            empty += 1
        else:
            raise self.empty(empty) if empty else self.nothing(split)

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
            return cached(self.spec, cache_dir, [CACHE_VERSION, tokenizer.fingerprint, fingerprint, more])
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
        return cached(self.spec, cache_dir, [*parts, more] if more else parts)

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
                f"{tokenizer.fingerprint}); shard the text again with `lattice shard`"
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
        yield from self.warnings()
        if split is not None:
            yield f"{self.given}: {count(source.n_docs, 'document')} to train on, the others held out"


def _read_as_ever(name: str, type: FileType) -> bool:
    """Whether version 1 of the cache, which knew few endings, read a file of that name in the same way."""
    if name.endswith((".jsonl", ".jsonl.gz")):
        return type.format == "lines" and type.compression == ("gz" if name.endswith(".gz") else "")
    return type.format == ("parquet" if name.endswith(".parquet") else "text") and not type.compression


register(Text())
