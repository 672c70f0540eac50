"""JSON records: JSON Lines, and what else lies under .json: an array of objects, or objects one after the
other over several lines. Read in chunks, so a file may be larger than memory.
"""

import codecs
import json
from collections.abc import Iterable, Iterator
from typing import IO, Any

from llm.errors import UserError

MAX_RECORD_BYTES = 1 << 28  # one record; also what a packed file can reach in memory
CHUNK_BYTES = 1 << 20
BLANKS = " \t\r\n"
DECODER = json.JSONDecoder()
KIND_WITH = {
    "messages": "chat", "conversations": "chat", "instruction": "chat", "chosen": "preference",
    "completion": "completion",
}  # fmt: skip
"""The kind of data whose rows usually have a column of that name."""


def json_lines(stream: IO[bytes], where: str) -> Iterator[tuple[int, str, Any]]:
    """(line from 1, what messages call it, its record) of JSON Lines; blank lines have none. UserError naming `where`
    and the line.
    """
    number = 0
    while line := stream.readline(MAX_RECORD_BYTES + 1):
        number += 1
        place = f"{where}, line {number}"
        if len(line) > MAX_RECORD_BYTES:
            raise UserError(f"{place}: longer than {MAX_RECORD_BYTES} bytes; is it JSONL, one object a line?")
        if line.strip():
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                record = json.loads(text)
            except UnicodeDecodeError as error:
                raise UserError(f"{place}: not UTF-8 at byte {error.start}") from None
            except (ValueError, RecursionError) as error:
                raise UserError(f"{place}: not JSON ({error})") from None
            yield number, f"line {number}", record


def json_file(stream: IO[bytes], where: str) -> Iterator[tuple[int, str, Any]]:
    """(record from 1, what messages call it, the record) of a .json file that is an array of objects, or objects one
    after the other.
    """
    reader = _Values(stream, where)
    for number, (line, record) in enumerate(reader.values(), 1):
        yield number, f"line {line} (record {number})", record


def is_json_lines(stream: IO[bytes]) -> bool:
    """Whether the first line that is not blank is a whole object, as in JSON Lines."""
    size = 0
    while line := stream.readline(MAX_RECORD_BYTES + 1):
        size += len(line)
        stripped = line.decode("utf-8-sig", errors="replace").strip()
        if stripped:
            try:
                return isinstance(json.loads(stripped), dict)
            except (ValueError, RecursionError):
                return False
        if size > MAX_RECORD_BYTES:
            return False
    return False


def text_of(record: Any, where: str, text_field: str, option: str) -> str:
    """The text in a field of a JSON record. UserError naming `where`, and `option`, which chooses the field."""
    if not isinstance(record, dict):
        hint = "; an array belongs into a .json file" if isinstance(record, list) else ""
        raise UserError(f"{where}: a {type(record).__name__} where an object with a field {text_field!r} must be{hint}")
    text = record.get(text_field)
    if text_field in record and not isinstance(text, str):
        raise UserError(f"{where}: its field {text_field!r} is {called(text)}, not a text (see {option})")
    if not isinstance(text, str):
        names = ", ".join(map(repr, list(record)[:20])) or "no fields"
        raise UserError(
            f"{where}: no text in field {text_field!r} (see {option}); it has {names}{kind_hint(record, option)}"
        )
    return text


def kind_hint(names: Iterable[str], option: str) -> str:
    """End of a message about rows without text in a run's data: the kind of data that has columns of these names."""
    kind = next((KIND_WITH[name] for name in names if name in KIND_WITH), None)
    return f"; rows with such columns want `kind: {kind}` beside their path" if kind and "data." in option else ""


def called(value: Any) -> str:
    """What a value of JSON or Parquet that is no text is called in a message."""
    names = {bool: "true or false", list: "a list", dict: "an object", bytes: "bytes"}
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "a number"
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


class _Values:
    """The records of a JSON text that is read in chunks."""

    def __init__(self, stream: IO[bytes], where: str) -> None:
        self._stream, self._where = stream, where
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._bytes = 0
        self._text, self._at = "", 0
        self._line = 1
        self._counted = 0
        self._ended = False

    def values(self) -> Iterator[tuple[int, Any]]:
        """(line from 1 where it begins, value)."""
        in_array = self._next() == "["
        if in_array:
            self._at += 1
        first = True
        while character := self._next():
            if in_array and character == "]":
                self._at += 1
                if self._next():
                    raise self._error("more behind the end of the array")
                return
            if in_array and not first:
                if character != ",":
                    raise self._error("a comma or ] must be here")
                self._at += 1
                self._next()
            line = self._line
            yield line, self._value()
            first = False
        if in_array:
            raise self._error("the array does not end; is the file cut off?")

    def _next(self) -> str:
        """The next character that is no blank, which stays the next one; "" at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in BLANKS:
                    self._count_lines()
                    return self._text[self._at]
                self._at += 1
            if not self._read():
                self._count_lines()
                return ""

    def _value(self) -> Any:
        while True:
            try:
                value, self._at = DECODER.raw_decode(self._text, self._at)
            except RecursionError:
                raise self._error("nested too deeply") from None
            except json.JSONDecodeError as error:
                # what ends in the middle may only not have been read yet
                unread = error.pos >= len(self._text) - 16 or error.msg.startswith("Unterminated string")
                if not unread or not self._read(len(self._text) - self._at):
                    self._at = max(self._at, error.pos)
                    self._count_lines()
                    raise self._error(error.msg) from None
            else:
                return value

    def _read(self, held: int = 0) -> bool:
        """Read on, as much again as is held; False at the end."""
        if held > MAX_RECORD_BYTES:
            raise self._error(f"a record longer than {MAX_RECORD_BYTES} bytes")
        if self._ended:
            return False
        chunk = self._stream.read(max(CHUNK_BYTES, held))
        self._ended = not chunk
        try:
            text = self._decoder.decode(chunk, final=self._ended)
        except UnicodeDecodeError as error:
            pending = len(error.object) - len(chunk)
            raise UserError(f"{self._where}: not UTF-8 at byte {self._bytes - pending + error.start}") from None
        self._bytes += len(chunk)
        self._count_lines()
        self._text = self._text[self._at :] + text
        self._at = self._counted = 0
        return not self._ended

    def _count_lines(self) -> None:
        self._line += self._text.count("\n", self._counted, self._at)
        self._counted = max(self._counted, self._at)

    def _error(self, reason: str) -> UserError:
        return UserError(f"{self._where}, line {self._line}: not JSON as it is read here ({reason})")
