"""Files of prompts: JSONL with `prompt`, a JSON list, or plain text with a line a prompt.

A row in JSON may have `images`: paths of images, one for each `<image>` in its text.
"""

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm.errors import UserError

WRITTEN = ("completion", "tokens", "finish_reason", "sample")
"""Columns of the output beside those of the prompts."""
MOST_NAMED = 5
"""Bad rows that a message names."""


@dataclass(frozen=True)
class PromptRow:
    """A row of a file."""

    text: str
    """the prompt; "" where the row has messages"""
    columns: dict[str, Any]
    """the whole row, `prompt` included"""
    number: int
    """line of the file, or place in a JSON list, from 1"""
    column: str = "prompt"
    """what is continued: `prompt` or `messages`"""
    images: tuple[str, ...] = ()
    """paths of its images, as they stand there"""


def read_prompts(path: Path, chat: bool = False) -> tuple[list[PromptRow], bytes]:
    """The rows of a file, and its content. chat: a row may have `messages` instead of `prompt`.

    A file whose first line that is not blank is a JSON object or that is named .jsonl or .ndjson holds an object a
    line; blank lines are passed over there. One named .json holds such lines, or one list of objects or strings. In any
    other each line is a prompt as it stands, a blank one too, which begins a document. Any may be compressed (.gz).
    UserError names the file and the rows that are wrong.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"--prompts={path}: {error.strerror or error}") from None
    content = _unpacked(path, raw)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path} row {number}: not UTF-8 (byte 0x{content[error.start]:02X}); "
            f"convert it, for example with `iconv -t utf-8`"
        ) from None
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    if lines[-1] == "":
        lines.pop()
    prompts, faults = _rows(path, text, lines, chat)
    for row in prompts:
        clashing = [name for name in WRITTEN if name in row.columns]
        if clashing:
            faults.append((row.number, f"has a column `{clashing[0]}`, which the output has; rename it"))
        try:
            json.dumps(row.columns, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            faults.append((row.number, f"holds half a character ({error.object[error.start]!r}), which UTF-8 has not"))
    refuse(path, faults)
    if not prompts:
        raise UserError(f"{path}: holds no prompts")
    return prompts, raw


def refuse(path: Path, faults: list[tuple[int, str]]) -> None:
    """UserError naming the first bad rows of a file, if there are any."""
    if faults:
        faults.sort(key=lambda fault: fault[0])
        named = "; ".join(f"row {number}: {fault}" for number, fault in faults[:MOST_NAMED])
        more = f"; and {len(faults) - MOST_NAMED} more rows" if len(faults) > MOST_NAMED else ""
        raise UserError(f"{path} {named}{more}")


def _unpacked(path: Path, raw: bytes) -> bytes:
    if path.suffix != ".gz":
        return raw
    try:
        return gzip.decompress(raw)
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: not a gzip file, or damaged ({error})") from None


def _rows(
    path: Path, text: str, lines: list[str], chat: bool
) -> tuple[list[PromptRow], list[tuple[int, str]]]:
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix == ".json" and text.lstrip().startswith("["):
        try:
            found = json.loads(text)
        except ValueError as error:
            raise UserError(f"{path}: not JSON ({error})") from None
        listed = [{"prompt": item} if isinstance(item, str) else item for item in found]
        return _checked(list(enumerate(listed, 1)), chat)
    first = next((line for line in lines if line.strip()), "")
    if suffix not in (".jsonl", ".ndjson", ".json") and not _is_object(first):
        return [PromptRow(line, {"prompt": line}, number) for number, line in enumerate(lines, 1)], []
    values: list[tuple[int, Any]] = []
    faults = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                values.append((number, json.loads(line)))
            except (ValueError, RecursionError) as error:
                faults.append((number, f"not JSON ({error})"))
    rows, others = _checked(values, chat)
    return rows, faults + others


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _checked(values: list[tuple[int, Any]], chat: bool) -> tuple[list[PromptRow], list[tuple[int, str]]]:
    rows: list[PromptRow] = []
    faults: list[tuple[int, str]] = []
    for number, value in values:
        if not isinstance(value, dict):
            faults.append((number, f"is {_kind(value)}, not an object with `prompt`"))
        elif chat and "messages" in value:
            rows.append(PromptRow("", value, number, "messages"))
        elif "prompt" not in value:
            columns = ", ".join(value) or "none"
            wanted = "`messages` or `prompt`" if chat else "`prompt`"
            faults.append((number, f"has no {wanted} (its columns: {columns})"))
        elif not isinstance(value["prompt"], str):
            faults.append((number, f"`prompt` is {_kind(value['prompt'])}, not a text"))
        elif (images := _paths(value.get("images"))) is None:
            faults.append((number, "`images` is no list of paths"))
        else:
            rows.append(PromptRow(value["prompt"], value, number, images=images))
    return rows, faults


def _paths(images: Any) -> tuple[str, ...] | None:
    """The paths of a row's images; None where they are something else."""
    listed = [] if images is None else [images] if isinstance(images, str) else images
    if not isinstance(listed, list) or not all(isinstance(path, str) for path in listed):
        return None
    return tuple(listed)


def _kind(value: Any) -> str:
    names = {list: "a list", dict: "an object", str: "a text", type(None): "null", bool: "true or false"}
    return names.get(type(value), "a number")
