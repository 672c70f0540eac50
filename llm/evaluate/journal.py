"""What has been answered so far, kept as it is answered, so that a killed evaluation goes on: DIR/journal.

identity.json says of which model, tokenizer and tasks the answers are: others are refused, by name. Each process that
answers appends to a file of its own, NNN.jsonl, a line an answer under its request's digest, flushed to the disk a
batch at a time. A line that a kill tore is cut off and asked for again. Which rank answered what plays no part later.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llm.atomic import sync, write_file
from llm.errors import DamagedFile, UserError
from llm.evaluate.requests import Answer, as_json, from_json

FOLDER, IDENTITY = "journal", "identity.json"
NUMBERED = re.compile(r"(\d{3,})\.jsonl")


class Journal:
    """The journal of an output folder. One job at a time; in it rank 0 opens and reads, ranks that answer append."""

    def __init__(self, output: Path) -> None:
        self.folder = output / FOLDER
        self._files: dict[int, int] = {}

    def models(self) -> dict[str, str]:
        """Digests of models by those of the files that they were read from, as far as they have been met here."""
        return self._said()["models"]

    def open(self, identity: Mapping[str, str], files: str, model: str) -> None:
        """Keep answers of this identity: what decides them, by the name that a message gives it. A name that was not
        there before is added, as another task is. UserError naming what is other than it was.

        files: digest of the files from which the model was read; model: its own.
        """
        self.check(identity)
        said = self._said()
        content = {"identity": said["identity"] | dict(identity), "models": said["models"] | {files: model}}
        if content != said:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_file(self.folder / IDENTITY, (json.dumps(content, indent=1) + "\n").encode())
            sync(self.folder)

    def check(self, identity: Mapping[str, str]) -> None:
        """UserError naming what of an identity is other than it was."""
        known = self._said()["identity"]
        changed = [name for name in identity if known.get(name, identity[name]) != identity[name]]
        if changed:
            others = "; ".join(_difference(name, known[name], identity[name]) for name in changed)
            raise UserError(
                f"--output={self.folder.parent}: holds answers of another evaluation ({others}); give another folder, "
                f"or remove this one"
            )

    def _said(self) -> dict[str, dict[str, str]]:
        file = self.folder / IDENTITY
        try:
            found = json.loads(file.read_bytes())
            return {key: {str(a): str(b) for a, b in found[key].items()} for key in ("identity", "models")}
        except FileNotFoundError:
            if self._numbers():
                raise UserError(
                    f"{file}: is missing, so nothing says of which model the answers beside it are; "
                    f"remove the folder {self.folder} to begin anew"
                ) from None
            return {"identity": {}, "models": {}}
        except OSError as error:
            raise UserError(f"{file}: {error.strerror or error}") from None
        except (ValueError, KeyError, AttributeError, TypeError):
            raise DamagedFile(f"{file}: damaged; remove the folder {self.folder} to begin anew") from None

    def read(self) -> dict[str, Answer]:
        """All answers by the digests of their requests; torn last lines are cut off their files. DamagedFile naming
        file and line where anything else is none of ours.
        """
        found: dict[str, Answer] = {}
        for number in self._numbers():
            path = self._path(number)
            whole = 0
            with path.open("rb") as file:
                for row, line in enumerate(file, start=1):
                    if not line.endswith(b"\n"):
                        break
                    key, answer = _parsed(line, path, row)
                    if found.setdefault(key, answer) != answer:
                        raise DamagedFile(
                            f"{path} line {row}: damaged: the request has another answer in an earlier line"
                        )
                    whole += len(line)
            if whole < path.stat().st_size:
                os.truncate(path, whole)
        return found

    def next_number(self) -> int:
        """Of the file that a process which starts now may write, and any number after it."""
        return max(self._numbers(), default=-1) + 1

    def append(self, number: int, answers: Iterable[tuple[str, Answer]]) -> None:
        """Add answers to a file of this process, by the digests of their requests; they are on the disk when this
        returns. UserError where that cannot be."""
        lines = "".join(json.dumps({"key": key, "answer": as_json(answer)}) + "\n" for key, answer in answers)
        path = self._path(number)
        try:
            if number not in self._files:
                self._files[number] = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
                sync(self.folder)
            rest = memoryview(lines.encode())
            while rest:
                rest = rest[os.write(self._files[number], rest) :]
            os.fsync(self._files[number])
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written ({error.strerror}); the same command goes on from the last whole line"
            ) from None

    def close(self) -> None:
        """Close what this process has written."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:03}.jsonl"

    def _numbers(self) -> list[int]:
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        return sorted(int(match[1]) for match in map(NUMBERED.fullmatch, names) if match)


def _difference(name: str, was: str, now: str) -> str:
    """A digest says nothing to a reader; short words do."""
    digests = all(re.fullmatch(r"[0-9a-f]{16,}", value) for value in (was, now))
    return f"{name} changed" if digests else f"{name} is {now}, was {was}"


def _parsed(line: bytes, path: Path, row: int) -> tuple[str, Answer]:
    try:
        found: dict[str, Any] = json.loads(line)
        return str(found["key"]), from_json(found["answer"])
    except (ValueError, KeyError, TypeError):
        raise DamagedFile(
            f"{path} line {row}: damaged; remove that line, whose answer is then asked for again"
        ) from None
