"""A source: a folder with `manifest.json` and `shards/*.arrow`, read as one long stream of tokens.

Each document is `[bos] + tokens + [eos]`, without the begin mark where the tokenizer puts none; documents follow one
another without gaps.

Shapes: T row length.
"""

import hashlib
import json
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llm.data.documents import split_key
from llm.data.found import Found
from llm.data.rows import Origin
from llm.data.shards import Shard, ShardEntry, check_content, check_size, damaged
from llm.errors import UserError

MANIFEST = "manifest.json"
SHARDS = "shards"


class TokenizerEntry(BaseModel):
    """The tokenizer a source was made with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    fingerprint: str
    vocab_size: int
    bos_id: int
    eos_id: int


class FolderEntry(BaseModel):
    """Where a stretch of documents, in reading order, was read from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    documents: int = Field(ge=1)


class Manifest(BaseModel):
    """`manifest.json`: what the shards hold and how to know that they still do."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    kind: Literal["text"] = "text"
    tokenizer: TokenizerEntry
    dtype: Literal["uint16", "uint32"]
    documents: int
    tokens: int
    text_bytes: int
    shards: tuple[ShardEntry, ...]
    folders: tuple[FolderEntry, ...] = ()
    """Where the names of the documents start from; empty in sources made before this was kept, and for documents that
    come from no file."""
    found: Found | None = None
    """What the files held and what was left out; none in sources made before this was kept."""

    def fingerprint(self) -> str:
        """Hex digest of everything but `folders` and `found`, the shards' digests included: the same text gives the
        same one, wherever it lay.
        """
        return _digest(self.model_dump(mode="json", exclude={"folders", "found"}))

    def serialized(self) -> bytes:
        """The content of manifest.json: the fields, their fingerprint, and digests of `folders` and `found` if there
        are any.
        """
        absent = {key for key in ("folders", "found") if not getattr(self, key)}
        fields = self.model_dump(mode="json", exclude=absent)
        fields["fingerprint"] = self.fingerprint()
        for key in {"folders", "found"} - absent:
            fields[f"{key}_digest"] = _digest(fields[key])
        return (json.dumps(fields, indent=1) + "\n").encode()


@dataclass(frozen=True)
class Window:
    """What a row of T covers of a stream. tokens: (T + 1,) int64; starts: positions in 0..T at which a document begins,
    int64, ascending.
    """

    tokens: np.ndarray
    starts: np.ndarray


class TokenSource:
    """The token stream of one source folder. Shards are mapped, and their tokens checked, when a row of theirs is first
    read.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.given = str(path)
        """What its user calls it: where it was made from text, the text's path."""
        self.given_as_shards = True
        """Whether its user gave a folder of shards, not text."""
        self.notes: tuple[str, ...] = ()
        """Lines for people about what it was made of."""
        self.manifest = manifest
        self.n_tokens = manifest.tokens
        self.n_docs = manifest.documents
        self.n_bytes = manifest.text_bytes
        self.fingerprint = manifest.fingerprint()
        self.tokenizer_fingerprint = manifest.tokenizer.fingerprint
        self.eos_id = manifest.tokenizer.eos_id
        self._first_token = [0, *accumulate(entry.tokens for entry in manifest.shards)]
        self._first_document = [0, *accumulate(entry.documents for entry in manifest.shards)]
        self._folder_end = list(accumulate(folder.documents for folder in manifest.folders))
        self._mapped: dict[int, Shard] = {}

    @classmethod
    def open(cls, path: str | Path, verify: bool = False) -> "TokenSource":
        """Open a source folder; `verify` reads every shard and checks all digests. UserError names the file that is
        missing or damaged.
        """
        path = Path(path)
        source = cls(path, _read_manifest(path))
        for entry in source.manifest.shards:
            shard_path = source.shard_path(entry)
            if verify:
                check_content(shard_path, entry, source.manifest.tokenizer.vocab_size)
            else:
                check_size(shard_path, entry)
        return source

    def shard_path(self, entry: ShardEntry) -> Path:
        """Where a shard of the manifest lies."""
        return self.path / SHARDS / entry.name

    def n_rows(self, seq_len: int) -> int:
        """Number of whole rows of `seq_len` inputs and labels."""
        return max(0, (self.n_tokens - 1) // seq_len)

    def row(self, k: int, seq_len: int) -> Window:
        """Row `k` of 0..n_rows(seq_len)-1; IndexError otherwise."""
        tokens = np.empty(seq_len + 1, dtype=np.int64)
        return Window(tokens, self.read(k * seq_len, tokens))

    def read(self, first: int, out: np.ndarray) -> np.ndarray:
        """Copy stream tokens [first, first + len(out)) into `out`; returns the positions in `out` where documents
        begin.

        IndexError when the stream does not hold them all; UserError naming the shard when a shard proves damaged.
        """
        if not 0 <= first <= self.n_tokens - len(out):
            raise IndexError(f"tokens {first}..{first + len(out) - 1} of {self.path}, which has {self.n_tokens}")
        starts, done = [], 0
        number = bisect_right(self._first_token, first) - 1
        while done < len(out):
            shard = self._shard(number)
            start = first + done - self._first_token[number]
            stop = min(start + len(out) - done, len(shard.tokens))
            out[done : done + stop - start] = shard.tokens[start:stop]
            low, high = shard.starts[:-1].searchsorted((start, stop))
            starts.append(shard.starts[low:high] + (done - start))
            done += stop - start
            number += 1
        return starts[0] if len(starts) == 1 else np.concatenate(starts)

    def document_at(self, position: int) -> tuple[int, int]:
        """(document number in the source, offset in it) of a stream token; IndexError outside the stream.

        The offset counts the document's begin mark as 0.
        """
        if not 0 <= position < self.n_tokens:
            raise IndexError(f"token {position} of {self.path}, which has {self.n_tokens}")
        number = bisect_right(self._first_token, position) - 1
        starts, inside = self._shard(number).starts, position - self._first_token[number]
        document = int(starts.searchsorted(inside, side="right")) - 1
        return self._first_document[number] + document, inside - int(starts[document])

    def document_length(self, document: int) -> int:
        """Tokens of a document, its marks included; IndexError when there is no such document."""
        number, inside = self._place(document)
        starts = self._shard(number).starts
        return int(starts[inside + 1] - starts[inside])

    def origin(self, document: int) -> Origin:
        """The file, and the line or row in it, that a document was read from; IndexError when there is no such
        document, UserError naming the shard when its names are damaged.
        """
        number, inside = self._place(document)
        file, row = split_key(self._shard(number).name(inside))
        if self.manifest.folders:
            folder = self.manifest.folders[bisect_right(self._folder_end, document)].path
            file = str(Path(folder, file)) if folder else file
        return Origin(file, row)

    def _place(self, document: int) -> tuple[int, int]:
        """(shard, document in it)."""
        if not 0 <= document < self.n_docs:
            raise IndexError(f"document {document} of {self.path}, which has {self.n_docs}")
        number = bisect_right(self._first_document, document) - 1
        return number, document - self._first_document[number]

    def _shard(self, number: int) -> Shard:
        return self._mapped.get(number) or self._map(number)

    def _map(self, number: int) -> Shard:
        entry = self.manifest.shards[number]
        shard = self._mapped[number] = Shard(self.shard_path(entry), entry)
        if int(shard.tokens.max(initial=0)) >= self.manifest.tokenizer.vocab_size:
            raise damaged(
                self.shard_path(entry), f"tokens outside the vocabulary of {self.manifest.tokenizer.vocab_size}"
            )
        return shard


def is_source(path: Path) -> bool:
    """Whether `path` is a source folder (a half-written one has no manifest and is none)."""
    return (path / MANIFEST).is_file()


def _digest(value: object) -> str:
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()


def _read_manifest(path: Path) -> Manifest:
    file = path / MANIFEST
    try:
        fields = json.loads(file.read_bytes())
        written = fields.pop("fingerprint")
        digests = {key: fields.pop(f"{key}_digest", None) for key in ("folders", "found")}
        manifest = Manifest.model_validate(fields)
    except FileNotFoundError:
        raise UserError(
            f"{path}: not a token source (it has no {MANIFEST}); `lattice shard` makes one from text"
        ) from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"{file}: not a manifest of this version ({'.'.join(map(str, first['loc']))}: {first['msg']})"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: damaged manifest ({error}); make the source again with `lattice shard`") from None
    stated = {key: _digest(fields[key]) if fields.get(key) else None for key in digests}
    whole = manifest.fingerprint() == written and digests == stated
    if not whole or sum(folder.documents for folder in manifest.folders) not in (0, manifest.documents):
        raise UserError(
            f"{file}: damaged manifest (its content differs from its fingerprint); "
            f"make the source again with `lattice shard`"
        )
    return manifest
