"""All texts of the sources, with what is filled in as a gap: what a message can look like."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.shared import ROOT

GAP = "\0"
"""Stands for a value in a text."""


@cache
def texts() -> tuple[str, ...]:
    """Every text of the code of the project, docstrings aside."""
    files = [path for room in ("llm", "vision", "tools", "launch") for path in sorted((ROOT / room).rglob("*.py"))]
    return tuple(text for file in files for text in _of(file))


def _of(file: Path) -> Iterator[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else GAP for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.value


def printed(key: str) -> bool:
    """Whether some text has the parts of a key, which `...` separates, in their order."""
    parts = [part for part in key.split("...") if part.strip(" :;,.()=")]
    return bool(parts) and any(_has(text, parts) for text in texts())


def _has(text: str, parts: list[str]) -> bool:
    place = 0
    for part in parts:
        place = text.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return True
