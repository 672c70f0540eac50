"""The sources of a run, of whatever kinds, made ready and opened."""

from pathlib import Path

import llm.data.captions
import llm.data.chats
import llm.data.enumeration
import llm.data.labelled
import llm.data.pairs
import llm.data.text
import llm.data.values  # noqa: F401  (they register their kinds, or augmentations)
from llm.data.documents import option
from llm.data.kinds import KINDS, Asked, Kind, Opened
from llm.data.sources import Side, SourceFiles, source_files
from llm.errors import UserError


def kind_named(name: str, key: str = "kind") -> Kind:
    """The kind of data of a name, which stands under `key`. UserError with the known ones where there is none."""
    if name not in KINDS:
        raise UserError(f"{key}={name}: no such kind of data; known are {', '.join(sorted(KINDS))}")
    return KINDS[name]


def kind_of(files: SourceFiles) -> Kind:
    """The kind of a source."""
    return kind_named(files.spec.kind, option(files.key, "kind")[2:])


def check_rows(side: Side, cache_dir: str | Path) -> None:
    """UserError naming the key where a source of a side has nothing to read, or cannot be of its kind; looks at names
    only.
    """
    for files in source_files(side, cache_dir):
        kind_of(files).check(files)


def look_at_rows(side: Side, asked: Asked) -> None:
    """UserError naming key and file where a source of a side cannot be read up to its first row; writes nothing."""
    for files in source_files(side, asked.cache_dir):
        kind_of(files).look(files, asked)


def prepare_rows(side: Side, asked: Asked) -> None:
    """Make what the sources of a side are read from, unless it is there already; one process does it."""
    _check_packing(side, asked)
    for files in source_files(side, asked.cache_dir):
        kind_of(files).prepare(files, asked)


def open_rows(side: Side, asked: Asked) -> list[tuple[str, Opened, float]]:
    """(name, source, weight) of all sources of a side, which must have been prepared."""
    return [
        (files.spec.resolved_name(), kind_of(files).open(files, asked), files.spec.weight)
        for files in source_files(side, asked.cache_dir)
    ]


def _check_packing(side: Side, asked: Asked) -> None:
    kinds = [kind_of(files) for files in source_files(side, asked.cache_dir)]
    possible = {packing for kind in kinds for packing in kind.packings}
    if asked.packing is not None and asked.packing not in possible:
        names = ", ".join(sorted({kind.name for kind in kinds}))
        raise UserError(
            f"data.packing={asked.packing}: not for rows of kind {names}; possible is {' or '.join(sorted(possible))}"
        )
