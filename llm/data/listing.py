"""Which files a path stands for: those that are read, and those that are left out, each with the reason.

Nothing is skipped without a word: what is neither read nor left out for a known reason is refused by name.
"""

import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from llm.data.formats import POSSIBLE, FileType, file_type, is_card, shown, why_left_out
from llm.errors import UserError
from llm.shipped import made_by

HELD_OUT = re.compile(r"(valid|validation|val|dev|test|eval)([-_.].*)?")
"""Names of files and folders (lower case) that data sets give to what is not trained on."""
Identity = tuple[int, int]
"""Device and inode: the same for every path to a file."""


class InputFile(NamedTuple):
    """A file to read. name: its path from its folder on."""

    path: Path
    name: str
    folder: Path
    type: FileType
    status: os.stat_result

    @property
    def identity(self) -> Identity:
        """Device and inode."""
        return self.status.st_dev, self.status.st_ino


class LeftOut(NamedTuple):
    """A file or folder (name ends in a slash) that is not read."""

    name: str
    reason: str


@dataclass(frozen=True)
class Listing:
    """What a path stands for, in reading order. key: what the path was given as, as in `data.train=texts`."""

    path: Path
    key: str
    files: tuple[InputFile, ...]
    left_out: tuple[LeftOut, ...] = ()

    @property
    def given(self) -> str:
        """How messages call it."""
        return f"{self.key}={shown(self.path)}"

    @property
    def bytes(self) -> int:
        """Of all files to read, as they lie on the disk."""
        return sum(file.status.st_size for file in self.files)

    def without(self, elsewhere: Mapping[Identity, str]) -> "Listing":
        """The listing without the files that `elsewhere` gives a reason for leaving out; may be left without any."""
        files = tuple(file for file in self.files if file.identity not in elsewhere)
        out = [LeftOut(file.name, elsewhere[file.identity]) for file in self.files if file.identity in elsewhere]
        return Listing(self.path, self.key, files, (*self.left_out, *out))

    def named_held_out(self) -> list[str]:
        """Names of files of rows that are called a test or validation split, where other files are not."""
        files = [file for file in self.files if file.type.has_rows]
        found = [file.name for file in files if any(map(HELD_OUT.fullmatch, Path(file.name.lower()).parts))]
        return found if len(found) < len(self.files) else []

    def same_files(self) -> list[tuple[str, int]]:
        """(name of the first, how many more) of files that are read several times, through links."""
        times = Counter(file.identity for file in self.files)
        first = {file.identity: file.name for file in reversed(self.files)}
        return [(first[identity], count - 1) for identity, count in times.items() if count > 1]


def list_input(path: str | Path, key: str = "input", cache_dir: str | Path | None = None) -> Listing:
    """The files behind a path: itself, or all files below a folder, links followed, in the order of their names.

    cache_dir: left out where it lies below the folder.

    UserError naming `key` and the file: nothing to read, a file or folder that cannot be read, or one that may hold
    text in a form that is not read.
    """
    path = Path(path)
    given = f"{key}={shown(path)}"
    try:
        status = path.stat()
    except FileNotFoundError:
        what = f"a link to {shown(os.readlink(path))}, which is not there" if path.is_symlink() else None
        raise UserError(f"{given}: {what or 'no such file or directory'}{made_by(path)}") from None
    except OSError as error:
        raise UserError(f"{given}: cannot be read ({error.strerror or error})") from None
    if not stat.S_ISDIR(status.st_mode):
        return Listing(path, key, (_checked(path, path.name, path.parent, status, key),))
    walk = _Walk(path, key, None if cache_dir is None else Path(cache_dir))
    walk.run()
    files = _without_cards(walk)
    if not files:
        out = summary(walk.left_out)
        raise UserError(f"{given}: the folder has no files" + (f" to read; left out: {out}" if out else ""))
    return Listing(path, key, tuple(files), tuple(sorted(walk.left_out)))


def summary(left_out: list[LeftOut] | tuple[LeftOut, ...], most: int = 3) -> str:
    """What was left out, by reason: `.git/ (hidden); a.png, b.png and 7 more (image, sound or font)`."""
    reasons: dict[str, list[str]] = {}
    for name, reason in left_out:
        reasons.setdefault(reason, []).append(shown(name))
    parts = []
    for reason, names in reasons.items():
        more = f" and {len(names) - most:,} more" if len(names) > most else ""
        parts.append(f"{', '.join(names[:most])}{more} ({reason})")
    return "; ".join(parts)


def _checked(path: Path, name: str, folder: Path, status: os.stat_result, key: str) -> InputFile:
    where = f"{key}={shown(path)}"
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{where}: is no regular file (a pipe, socket or device); write its content to a file first")
    type_of_file = file_type(name)
    if type_of_file is None:
        raise UserError(f"{where}: cannot be read as text; possible are {POSSIBLE}")
    if not os.access(path, os.R_OK):
        raise UserError(f"{where}: cannot be read (Permission denied)")
    return InputFile(path, name, folder, type_of_file, status)


def _without_cards(walk: "_Walk") -> list[InputFile]:
    """The files in reading order, without those that describe data that lies beside them."""
    files = sorted(walk.files, key=lambda file: file.name)
    if not any(file.type.has_rows for file in files):
        return files
    cards = [file for file in files if is_card(file.path.name) and not file.type.has_rows]
    walk.left_out += [LeftOut(card.name, "a card beside data") for card in cards]
    return [file for file in files if file not in cards]


@dataclass
class _Walk:
    """A folder and all below it, each folder once."""

    root: Path
    key: str
    cache_dir: Path | None
    files: list[InputFile] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    def run(self) -> None:
        seen: dict[Identity, str] = {}
        # real folders first: a folder that is also reached by a link is read under its own name
        waiting, links = [self.root], list[Path]()
        while waiting or links:
            folder = waiting.pop() if waiting else links.pop(0)
            name = "" if folder == self.root else f"{folder.relative_to(self.root).as_posix()}/"
            status = folder.stat()
            identity = status.st_dev, status.st_ino
            if identity in seen:
                reason = f"a link to {shown(seen[identity]) or 'the folder itself'}, which is read"
                self.left_out.append(LeftOut(name, reason))
                continue
            seen[identity] = name
            no_text = self._no_text(folder) if name else None
            if no_text:
                self.left_out.append(LeftOut(name, no_text))
                continue
            for entry in self._entries(folder):
                below = self._entry(entry, f"{name}{entry.name}")
                if below is not None:
                    (links if entry.is_symlink() else waiting).append(below)

    def _entries(self, folder: Path) -> Iterator[os.DirEntry[str]]:
        try:
            with os.scandir(folder) as entries:
                yield from sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"{self.key}={shown(folder)}: the folder cannot be read ({error.strerror})") from None

    def _entry(self, entry: os.DirEntry[str], name: str) -> Path | None:
        """Take in a file, or leave it out; the path of a folder that is to be looked into."""
        path = self.root / name
        reason = why_left_out(entry.name)
        try:
            status = path.stat()
        except OSError as error:
            if reason is None:
                what = f"a link to {shown(os.readlink(path))}" if entry.is_symlink() else "cannot be read"
                why = "which is not there" if isinstance(error, FileNotFoundError) else error.strerror
                raise UserError(f"{self.key}={shown(path)}: {what}, {why}; remove it, or mend it") from None
            self.left_out.append(LeftOut(name, reason))
            return None
        is_folder = stat.S_ISDIR(status.st_mode)
        if is_folder and reason != "hidden":
            return path
        if reason is None and not stat.S_ISREG(status.st_mode):
            reason = "no regular file"
        if reason is None:
            self.files.append(_checked(path, name, self.root, status, self.key))
        else:
            self.left_out.append(LeftOut(f"{name}/" if is_folder else name, reason))
        return None

    def _no_text(self, folder: Path) -> str | None:
        """Why nothing below a folder is text of the user's: the project itself wrote it."""
        if self.cache_dir is not None and os.path.exists(self.cache_dir) and folder.samefile(self.cache_dir):
            return "the cache, data.cache_dir"
        if all(os.path.exists(folder / part) for part in ("manifest.json", "shards")):
            return "token shards, a source of their own"
        if all(os.path.exists(folder / part) for part in ("config.yaml", "log.txt", "metrics.jsonl")):
            return "a run folder"
        return None
