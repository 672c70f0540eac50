"""The `data:` section of a run config: its sources, and the files that each stands for."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from llm.data.documents import option
from llm.data.formats import shown
from llm.data.found import count
from llm.data.listing import Identity, Listing, list_input
from llm.data.source import SHARDS, is_source
from llm.data.split import Split
from llm.errors import UserError
from llm.paths import PathText

MOST_OF_NAME = 100
MOST_BYTES_OF_NAME = 200


class SourceSpec(BaseModel):
    """One source of a mixture, as it stands under `data.train` or `data.valid`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    path: PathText = Field(min_length=1)
    """a source folder made by `lattice shard`, or raw text: a file or a folder of .txt, .md, source code, .jsonl,
    .ndjson, .json, .csv, .parquet, .arrow; text, JSON and CSV also with .gz, .bz2, .xz or .zst behind"""
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """share of the rows, relative to the other sources"""
    name: str = ""
    """decides the order of this source's rows (letters, digits, . _ -); empty: the path's last part without endings"""
    text_field: str = "text"
    """column of JSON, CSV, Parquet and Arrow rows that holds the text"""
    kind: str = Field(default="text", min_length=1)
    """what its rows are: text | chat | completion | preference | image_text | labelled | values | pair, or a kind of an
    extension"""
    columns: dict[str, str | list[str]] = {}
    """of other kinds than text: our names of columns -> the file's, as {messages: dialog}; label and values may be
    lists"""
    augment: str | None = Field(default=None, min_length=1, exclude_if=lambda value: value is None)
    """of kind labelled: how texts are written anew each time they are trained on"""
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

    @property
    def single_columns(self) -> dict[str, str]:
        """Those of `columns` that are one column each."""
        return {name: column for name, column in self.columns.items() if isinstance(column, str)}

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
    source_files(data, cache_dir, key=key)


@dataclass(frozen=True)
class SourceFiles:
    """A source and what it is read from: the listed files, or a folder of shards where `listing` is None."""

    spec: SourceSpec
    key: str
    listing: Listing | None

    @property
    def given(self) -> str:
        """How messages call it."""
        return f"{self.key}={shown(self.spec.path)}"


    def nothing(self, split: Split | None, noun: str = "document") -> UserError:
        """The error where there are no documents, or what else `noun` says."""
        if split is None or (self.listing is not None and not self.listing.bytes):
            return UserError(f"{self.given}: has no {noun}s")
        what = "none is held out" if split.part == "valid" else "all are held out"
        more = f", the files to hold out, or for text files {option(self.key, 'separator')}"
        return UserError(
            f"data.valid={split.share}: of the {noun}s of {self.given} {what}; give another share"
            f"{more if noun == 'document' else ' or the files to hold out'}"
        )

    def warnings(self) -> Iterator[str]:
        """Lines about files that are called a test or validation split, and are trained on."""
        held_out = self.listing.named_held_out() if self.listing and self.key.startswith("data.train") else []
        if held_out:
            others = f" and {count(len(held_out) - 1, 'more file')}" if len(held_out) > 1 else ""
            yield (
                f"{self.given}: warning: {shown(held_out[0])}{others}, by the name not for training, is trained on; "
                f"give the training files alone, or these to data.valid"
            )


def _side(data: DataSpec | Side, key: str) -> Side:
    return data if isinstance(data, Side) else Side(key, data)


def source_files(
    data: DataSpec | Side, cache_dir: str | Path | None = None, *, key: str = "data.train"
) -> list[SourceFiles]:
    """The sources of a side with the files that each is read from. UserError naming `key` and the path where there is
    nothing to read; looks at names only.
    """
    side = _side(data, key)
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
        kept.append(SourceFiles(source.spec, source.key, listing))
    return kept


def _listed(key: str, data: DataSpec, cache_dir: str | Path | None) -> list[SourceFiles]:
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
        sources.append(SourceFiles(spec, own, listing))
    return sources


def _is_native(path: Path, key: str) -> bool:
    if is_source(path):
        return True
    if (path / SHARDS).is_dir():
        raise UserError(
            f"{key}={shown(path)}: has shards but no manifest.json, so it is not a whole source; "
            f"make it again with `lattice shard`"
        )
    return False
