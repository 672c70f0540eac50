"""A text corpus that every machine with Python has: the standard library's own sources, split into train and valid.

`python tools/stdlib_corpus.py --output DIR` writes train.jsonl and valid.jsonl with the fields `path` and `text`. A
file is held out when the one-byte blake2b digest of its relative path is a multiple of 20, so the split is the same
wherever the files are. Folders named `test` or `encodings`, installed packages, exact duplicates (the first in the
order of paths stays), empty files and files that are not UTF-8 are left out on both sides.
"""

import hashlib
import json
import platform
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from llm.atomic import new_directory
from llm.cli import run_cli
from llm.errors import UserError
from llm.paths import PathText

EXCLUDED_FOLDERS = frozenset({"test", "encodings", "site-packages", "dist-packages", "__pycache__"})
HELD_OUT_OF = 20


@dataclass
class Corpus:
    """(path, text) of each file, in the order of paths; left_out counts files by reason."""

    train: list[tuple[str, str]] = field(default_factory=list)
    valid: list[tuple[str, str]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def collect(root: Path) -> Corpus:
    """Read and split the Python files below `root`."""
    corpus = Corpus()
    seen: set[bytes] = set()
    for path in sorted(_python_files(root), key=lambda path: path.relative_to(root).as_posix()):
        name = path.relative_to(root).as_posix()
        content = path.read_bytes()
        try:
            text = content.decode()
        except UnicodeDecodeError:
            corpus.left_out["not UTF-8"] += 1
            continue
        if not content or content in seen:
            corpus.left_out["duplicate" if content else "empty"] += 1
            continue
        seen.add(content)
        (corpus.valid if is_held_out(name) else corpus.train).append((name, text))
    return corpus


def is_held_out(name: str) -> bool:
    """Whether the file with this relative POSIX path belongs to the validation split."""
    return hashlib.blake2b(name.encode(), digest_size=1).digest()[0] % HELD_OUT_OF == 0


def write_corpus(output: PathText) -> None:
    """Write the standard library of this Python as train.jsonl and valid.jsonl into a new folder, whole or not at all.

    output: the folder to make; one that holds the same corpus already is left as it is
    """
    root = Path(sysconfig.get_path("stdlib"))
    corpus = collect(root)
    if not corpus.train or not corpus.valid:
        raise UserError(
            f"{root}: this Python has too few library sources ({len(corpus.train)} train, {len(corpus.valid)} valid)"
        )
    files = {"train.jsonl": _jsonl(corpus.train), "valid.jsonl": _jsonl(corpus.valid)}
    folder = Path(output)
    if not folder.exists():
        with new_directory(folder) as temporary:
            for name, content in files.items():
                (temporary / name).write_bytes(content)
    elif any(
        not (folder / name).is_file() or (folder / name).read_bytes() != content for name, content in files.items()
    ):
        raise UserError(f"--output={output}: exists and holds something else; remove it or name another folder")
    for name, rows in (("train", corpus.train), ("valid", corpus.valid)):
        print(f"{name}: {len(rows)} files, {sum(len(text.encode()) for _, text in rows)} bytes")
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(corpus.left_out.items())) or "none"
    print(f"left out: {reasons}; from Python {platform.python_version()} at {root}")


def _python_files(root: Path) -> Iterator[Path]:
    for path in root.rglob("*.py"):
        if path.is_file() and not EXCLUDED_FOLDERS.intersection(path.relative_to(root).parts[:-1]):
            yield path


def _jsonl(rows: list[tuple[str, str]]) -> bytes:
    return "".join(json.dumps({"path": path, "text": text}) + "\n" for path, text in rows).encode()


if __name__ == "__main__":
    run_cli(write_corpus)
