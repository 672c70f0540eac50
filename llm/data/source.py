"""A source: a folder with `manifest.json` and `shards/*.arrow`, read as one long stream of tokens.

Each document is `[bos] + tokens + [eos]`; documents follow one another without gaps. Row k of length T covers stream
tokens [k T, k T + T]: T inputs and, shifted by one, T labels, so neighbouring rows share one token and every token but
a row's first is a label once.

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
from pydantic import BaseModel, ConfigDict, ValidationError

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

    def fingerprint(self) -> str:
        """Hex digest of everything above, the shards' digests included."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()

    def serialized(self) -> bytes:
        """The content of manifest.json: the fields and their fingerprint."""
        fields = self.model_dump(mode="json") | {"fingerprint": self.fingerprint()}
        return (json.dumps(fields, indent=1) + "\n").encode()


@dataclass(frozen=True)
class Row:
    """tokens: (T + 1,) int64; starts: positions in 0..T at which a document begins, int64, ascending."""

    tokens: np.ndarray
    starts: np.ndarray


class TokenSource:
    """The token stream of one source folder. Shards are mapped, and their tokens checked, when a row of theirs is first
    read.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self.n_tokens = manifest.tokens
        self.n_docs = manifest.documents
        self.n_bytes = manifest.text_bytes
        self.fingerprint = manifest.fingerprint()
        self.tokenizer_fingerprint = manifest.tokenizer.fingerprint
        self.eos_id = manifest.tokenizer.eos_id
        self._first_token = [0, *accumulate(entry.tokens for entry in manifest.shards)]
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

    def row(self, k: int, seq_len: int) -> Row:
        """Row `k` of 0..n_rows(seq_len)-1; IndexError otherwise."""
        tokens = np.empty(seq_len + 1, dtype=np.int64)
        return Row(tokens, self.read(k * seq_len, tokens))

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
            shard = self._mapped.get(number) or self._map(number)
            begin = first + done - self._first_token[number]
            end = min(begin + len(out) - done, len(shard.tokens))
            out[done : done + end - begin] = shard.tokens[begin:end]
            low, high = shard.starts[:-1].searchsorted((begin, end))
            starts.append(shard.starts[low:high] + (done - begin))
            done += end - begin
            number += 1
        return starts[0] if len(starts) == 1 else np.concatenate(starts)

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


def _read_manifest(path: Path) -> Manifest:
    file = path / MANIFEST
    try:
        fields = json.loads(file.read_bytes())
        written = fields.pop("fingerprint")
        manifest = Manifest.model_validate(fields)
    except FileNotFoundError:
        raise UserError(
            f"{path}: not a token source (it has no {MANIFEST}); tools/shard.py makes one from text"
        ) from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"{file}: not a manifest of this version ({'.'.join(map(str, first['loc']))}: {first['msg']})"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: damaged manifest ({error}); make the source again with tools/shard.py") from None
    if manifest.fingerprint() != written:
        raise UserError(
            f"{file}: damaged manifest (its content differs from its fingerprint); "
            f"make the source again with tools/shard.py"
        )
    return manifest
