"""The pages of the documentation: their files, blocks, links and headings."""

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tests.shared import ROOT
from tests.siblings.seeds import blocks_of

FILES = (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))
PAGES = tuple(sorted(path.relative_to(ROOT).as_posix() for path in FILES))
LANGUAGES = ("python", "sh", "yaml", "text")
"""What a block can be called. What is no command, code or config is text: what a command prints, or a drawing."""
SPELLED = {"bash": "sh", "shell": "sh", "console": "sh"}


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str
    heading: str

    @property
    def place(self) -> str:
        """For messages and for the names of tests."""
        return f"{self.page}:{self.line}"


@cache
def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@cache
def blocks(page: str) -> tuple[Block, ...]:
    """All blocks of a page, in order."""
    return tuple(
        Block(page, block.line, SPELLED.get(block.language, block.language), block.text, block.heading)
        for block in blocks_of(text_of(page))
    )


def all_blocks(language: str) -> list[Block]:
    """Those of all pages in a language."""
    return [block for page in PAGES for block in blocks(page) if block.language == language]


def prose(page: str) -> str:
    """A page without its blocks and without code in its lines."""
    outside = re.sub(r"^\s*```.*?^\s*```\s*$", "", text_of(page), flags=re.M | re.S)
    return re.sub(r"`[^`]*`", "", outside)


def links(page: str) -> list[str]:
    """Where the links of a page lead."""
    return re.findall(r"\[[^\]]*\]\(\s*([^)\s]+)\s*\)", prose(page))


@cache
def anchors(page: str) -> frozenset[str]:
    """What `#` may be followed by in a link to a page, as GitHub makes it of headings."""
    found: list[str] = []
    outside = re.sub(r"^\s*```.*?^\s*```\s*$", "", text_of(page), flags=re.M | re.S)
    for heading in re.findall(r"^#{1,6} (.*)$", outside, flags=re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        made = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        repeated = sum(re.fullmatch(rf"{re.escape(made)}(-\d+)?", other) is not None for other in found)
        found.append(f"{made}-{repeated}" if repeated else made)
    return frozenset(found)


def target(page: str, link: str) -> tuple[Path, str]:
    """The file that a link of a page leads to, and what in it."""
    path, _, inside = link.partition("#")
    return ((ROOT / page).parent / path if path else ROOT / page).resolve(), inside
