"""What the files of a source turned out to hold: kept in its manifest, and said at the start of runs that read it."""

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict, Field

from llm.data.formats import FORMAT_OF, shown
from llm.data.listing import InputFile, LeftOut, Listing, summary

MARKS = (
    "<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[EOS]", "<|eos|>", "<EOD>", "<|im_end|>", "<|eot_id|>",
    "<|end|>", "<end_of_turn>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "[SEP]", "<|endofdocument|>", "<|im_sep|>",
)  # fmt: skip
"""What ends a document in text files of well-known data sets and tools."""
MANY = 3
"""Marks from which on a text is taken for several documents."""
EXAMPLES = 8
"""Names of a kind that a manifest keeps."""


class FoundEnding(BaseModel):
    """Files of one ending. bytes: of the files, as they lie on the disk."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ending: str
    files: int = Field(ge=0)
    documents: int | None = None
    bytes: int = Field(ge=0)


class FoundMark(BaseModel):
    """A mark that text files have, though they were not cut at it; file: the first of them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mark: str
    times: int
    files: int
    file: str


class Found(BaseModel):
    """What was read and what was not."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    endings: tuple[FoundEnding, ...]
    empty: int = 0
    """Documents without text."""
    no_documents: tuple[str, ...] = ()
    """Files without any document, a few of them."""
    marks: tuple[FoundMark, ...] = ()
    json_as_text: tuple[str, ...] = ()
    """Text files that look like JSON Lines, a few of them."""
    separator_in_none: str | None = None
    """The separator, where no text file has it."""
    repeated: tuple[tuple[str, int], ...] = ()
    """A file that is read several times through links, and how many times more; a few of them."""
    left_out: tuple[tuple[str, str], ...] = ()
    """(name, reason) of files and folders that were not read; of each reason a few."""
    left_out_more: int = 0
    """How many more there are."""


@dataclass
class Inventory:
    """Counts what is read, file by file."""

    _endings: dict[str, list[int]] = field(default_factory=dict)
    _marks: dict[str, tuple[int, int, str]] = field(default_factory=dict)
    _json: list[str] = field(default_factory=list)
    _empty_files: list[str] = field(default_factory=list)
    _empty: int = 0
    _separator: str | None = None
    _cut: bool = False
    _file: InputFile | None = None
    _of_file: int = 0

    def begin_file(self, file: InputFile) -> None:
        """The documents that follow are of this file."""
        self.end_file()
        self._file, self._of_file = file, 0
        counts = self._endings.setdefault(file.type.ending, [0, 0, 0])
        counts[0] += 1
        counts[2] += file.status.st_size

    def end_file(self) -> None:
        """The last file has been read."""
        if self._file is not None and self._of_file == 0:
            self._empty_files.append(shown(self._file.name))
        self._file = None

    def add(self, is_empty: bool) -> None:
        """A document of the current file."""
        assert self._file is not None
        self._of_file += 1
        self._endings[self._file.type.ending][1] += 1
        self._empty += is_empty

    def look(self, text: str) -> None:
        """A whole text file that will be one document: does it look like several?"""
        assert self._file is not None
        name = shown(self._file.name)
        for mark in MARKS:
            times = text.count(mark)
            if times >= MANY:
                before, files, first = self._marks.get(mark, (0, 0, name))
                self._marks[mark] = before + times, files + 1, first
        if _looks_like_json_lines(text):
            self._json.append(name)

    def cut_at(self, separator: str, times: int) -> None:
        """A text file that has the separator so many times."""
        self._separator, self._cut = separator, self._cut or times > 0

    @property
    def documents(self) -> int:
        """How many have been read."""
        return sum(documents for _, documents, _ in self._endings.values())

    def found(self, listings: Sequence[Listing]) -> Found:
        """All that was counted, and what the listings left out."""
        self.end_file()
        return listed(listings).model_copy(
            update={
                "endings": tuple(
                    FoundEnding(ending=ending, files=files, documents=documents, bytes=size)
                    for ending, (files, documents, size) in self._endings.items()
                ),
                "empty": self._empty,
                "no_documents": tuple(self._empty_files[:EXAMPLES]),
                "marks": tuple(
                    FoundMark(mark=mark, times=times, files=files, file=first)
                    for mark, (times, files, first) in self._marks.items()
                ),
                "json_as_text": tuple(self._json[:EXAMPLES]),
                "separator_in_none": None if self._cut else self._separator,
            }
        )


def listed(listings: Sequence[Listing]) -> Found:
    """What can be said before anything was read."""
    endings: dict[str, list[int]] = {}
    kept: list[LeftOut] = []
    repeated: list[tuple[str, int]] = []
    more = 0
    for listing in listings:
        for file in listing.files:
            counts = endings.setdefault(file.type.ending, [0, 0])
            counts[0] += 1
            counts[1] += file.status.st_size
        of_reason: dict[str, int] = {}
        for name, reason in listing.left_out:
            of_reason[reason] = of_reason.get(reason, 0) + 1
            if of_reason[reason] <= EXAMPLES:
                kept.append(LeftOut(shown(name), reason))
            else:
                more += 1
        repeated += [(shown(name), times) for name, times in listing.same_files()]
    return Found(
        endings=tuple(FoundEnding(ending=ending, files=n, bytes=size) for ending, (n, size) in endings.items()),
        repeated=tuple(repeated[:EXAMPLES]),
        left_out=tuple((name, reason) for name, reason in kept),
        left_out_more=more,
    )


def found_lines(
    given: str, found: Found, documents: int | None, separator_option: str, noun: str = "document"
) -> Iterator[str]:
    """Lines for people about a source that they gave as `given`; `documents`: their number, where it is known;
    noun: what one is called.
    """
    endings = sorted(found.endings, key=lambda entry: -entry.bytes)
    files = sum(entry.files for entry in endings)
    total = "" if documents is None else f", {count(documents, noun)}"
    line = f"{given}: {count(files, 'file')}{total}, {_size(sum(entry.bytes for entry in endings))}"
    parts = [_ending(entry, noun) for entry in endings]
    line += f" ({'; '.join(parts) if len(parts) > 1 else endings[0].ending or 'no ending'})" if endings else ""
    if found.left_out:
        more = f", and {found.left_out_more:,} more" if found.left_out_more else ""
        line += f"; left out: {summary([LeftOut(*entry) for entry in found.left_out])}{more}"
    yield line
    kinds = {FORMAT_OF.get(entry.ending.lstrip(".").partition(".")[0], "text") for entry in endings}
    if "text" in kinds and len(kinds) > 1:
        yield f"{given}: warning: text files lie beside files of rows, and both are read; move away what is not meant"
    if found.empty:
        yield f"{given}: {count(found.empty, 'document')} without any text"
    if found.no_documents:
        yield f"{given}: no {noun} in {', '.join(found.no_documents)}"
    for name, times in found.repeated:
        yield f"{given}: {name} is read {times + 1} times, through links"
    for mark in found.marks:
        yield (
            f"{given}: warning: {mark.file} has {mark.mark} {_times(mark)}, but a text file is one document; "
            f"if the mark ends documents, give {separator_option}={shlex.quote(mark.mark)}"
        )
    if found.separator_in_none is not None:
        yield (
            f"{given}: warning: {separator_option}={shlex.quote(shown(found.separator_in_none))} is in no text file, "
            f"so each file is one document"
        )
    for name in found.json_as_text:
        yield f"{given}: warning: {name} looks like JSON Lines but is read as one text; name it .jsonl"


def _times(mark: FoundMark) -> str:
    others = f" (with {count(mark.files - 1, 'more file')})" if mark.files > 1 else ""
    return f"{mark.times:,} times{others}"


def _ending(entry: FoundEnding, noun: str) -> str:
    documents = "" if entry.documents is None else f", {count(entry.documents, noun)}"
    return f"{entry.files:,} {entry.ending or 'without ending'}{documents}, {_size(entry.bytes)}"


def count(number: int, noun: str) -> str:
    """`1 file`, `2 files`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _size(size: int) -> str:
    for unit, value in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= value:
            return f"{size / value:.1f} {unit}"
    return f"{size} bytes"


def _looks_like_json_lines(text: str) -> bool:
    """Whether the first two lines are JSON objects."""
    lines = text[: 1 << 16].splitlines()[:2]
    try:
        return len(lines) == 2 and all(isinstance(json.loads(line), dict) for line in lines)
    except (ValueError, RecursionError):
        return False
