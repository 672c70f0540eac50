"""The documents that the adapters follow, as blocks of code.

They lie in ../shared, which a clone need not have; the tests that read them skip without it.
"""

import re
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.shared import SHARED

SEEDS = SHARED / "reference" / "seeds"
needs_seeds = pytest.mark.skipif(
    not SEEDS.is_dir(), reason="the folder ../shared with the seeds' documents is not beside this clone"
)


class CodeBlock(NamedTuple):
    """A fenced block of a document."""

    heading: str
    language: str
    text: str
    line: int
    """Of its first fence."""


def seed(number: str) -> str:
    """The document of a seed, by the number that its name begins with; spaces that do not break are spaces."""
    (found,) = SEEDS.glob(f"{number}_*.txt")
    return found.read_text(encoding="utf-8").replace("\xa0", " ")


def blocks_of(text: str) -> list[CodeBlock]:
    """All fenced blocks of a Markdown text, indented ones too, with the heading that each stands under."""
    found, heading, language, begin = [], "", None, 0
    body: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        fence = re.match(r"\s*```(\w*)", line)
        if fence and language is None:
            language, body, begin = fence[1], [], number
        elif fence:
            found.append(CodeBlock(heading, str(language), textwrap.dedent("\n".join(body)), begin))
            language = None
        elif language is not None:
            body.append(line)
        elif line.startswith("#"):
            heading = line.lstrip("# ").strip()
    return found


def blocks_of_file(path: Path) -> list[CodeBlock]:
    return blocks_of(path.read_text(encoding="utf-8"))
