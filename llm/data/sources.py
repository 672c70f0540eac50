"""The `data:` section of a run config turned into opened token sources; raw text is sharded into a cache first.

The two steps are apart so that a run needs no lock: one process calls `prepare_data`, all wait at a barrier, then
everyone calls `open_data`. Should two runs prepare the same text at once, both do the work and the faster one's folder
stays.
"""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from llm.data.build import build_source
from llm.data.documents import input_files, read_documents
from llm.data.source import SHARDS, TokenSource, is_source
from llm.errors import UserError
from llm.paths import PathText
from llm.tokenizer import Tokenizer

CACHE_VERSION = 1  # raise it when the same text and tokenizer would give other shards


class SourceSpec(BaseModel):
    """One source of a mixture, as it stands under `data.train` or `data.valid`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    path: PathText = Field(min_length=1)
    """a source folder made by tools/shard.py, or raw text: a text file, a folder, .jsonl, .jsonl.gz, .parquet"""
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """share of the rows, relative to the other sources"""
    name: str = ""
    """decides the order of this source's rows; empty: the path's last part without its endings"""
    text_field: str = "text"
    """field of JSONL and Parquet rows that holds the text"""

    def resolved_name(self) -> str:
        """The name, or the one made from the path."""
        return self.name or Path(self.path).name.split(".")[0] or Path(self.path).name


DataSpec = str | Path | Sequence[SourceSpec]
"""What `data.train` and `data.valid` may be."""


def source_specs(data: DataSpec) -> list[SourceSpec]:
    """The list form of a `data` entry; a path alone is one source."""
    return [SourceSpec(path=str(data))] if isinstance(data, str | Path) else list(data)


def check_data(data: DataSpec, *, key: str = "data.train") -> None:
    """UserError naming `key` and the path where there is nothing to read; looks at names only."""
    for spec in source_specs(data):
        path = Path(spec.path)
        if not _is_native(path, key):
            input_files(path, key)


def prepare_data(
    data: DataSpec, tokenizer: Tokenizer, cache_dir: str | Path, *, key: str = "data.train", threads: int = 1
) -> None:
    """Shard the raw text among `data` into `cache_dir`, unless it is there already. Shows progress. UserError names
    `key` and the file.
    """
    for spec in source_specs(data):
        path = Path(spec.path)
        if _is_native(path, key):
            continue
        target = _cache_folder(spec, tokenizer, Path(cache_dir), key)
        if is_source(target):
            continue
        documents = read_documents(path, text_field=spec.text_field, key=key)
        total_bytes = sum(file.stat().st_size for file in input_files(path, key))
        with suppress(FileExistsError):  # another run prepared the same text meanwhile
            build_source(
                documents, tokenizer, target, total_bytes=total_bytes, threads=threads, name=f"{key}={path}"
            )


def open_data(
    data: DataSpec, tokenizer: Tokenizer, cache_dir: str | Path, *, key: str = "data.train", verify: bool = False
) -> list[tuple[str, TokenSource, float]]:
    """(name, source, weight) of all of `data`, ready for `Mixture`. Raw text must have been prepared.

    UserError names `key` and the file: missing, damaged, or made with another tokenizer. `verify` reads every shard
    whole.
    """
    opened = []
    for spec in source_specs(data):
        path = Path(spec.path)
        folder = path if _is_native(path, key) else _cache_folder(spec, tokenizer, Path(cache_dir), key)
        source = TokenSource.open(folder, verify=verify)
        if source.tokenizer_fingerprint != tokenizer.fingerprint:
            made_with = source.manifest.tokenizer
            raise UserError(
                f"{key}={path}: made with another tokenizer ({made_with.kind}, {made_with.vocab_size} ids, "
                f"{made_with.fingerprint}) than this run's ({tokenizer.kind}, {tokenizer.vocab_size} ids, "
                f"{tokenizer.fingerprint}); shard the text again with tools/shard.py"
            )
        opened.append((spec.resolved_name(), source, spec.weight))
    return opened


def _is_native(path: Path, key: str) -> bool:
    if is_source(path):
        return True
    if (path / SHARDS).is_dir():
        raise UserError(
            f"{key}={path}: has shards but no manifest.json, so it is not a whole source; "
            f"make it again with tools/shard.py"
        )
    return False


def _cache_folder(spec: SourceSpec, tokenizer: Tokenizer, cache_dir: Path, key: str) -> Path:
    """Where this text in this tokenizer's ids belongs: named by the files' paths, sizes and times, which are quick to
    ask.
    """
    path = Path(spec.path).resolve()
    files = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in input_files(path, key)]
    parts = json.dumps([CACHE_VERSION, tokenizer.fingerprint, spec.text_field, files])
    digest = hashlib.blake2b(parts.encode(), digest_size=12).hexdigest()
    return cache_dir / f"{spec.resolved_name()}-{digest}"
