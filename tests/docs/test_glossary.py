"""docs/glossary.md: each word once, each with a file that is there."""

import re

from tests.docs.pages import text_of
from tests.shared import ROOT

ENTRIES = re.findall(r"^- (\*\*.*?)(?=^- |^$)", text_of("docs/glossary.md"), flags=re.M | re.S)


def test_every_word_has_one_entry_with_a_file_that_exists() -> None:
    words = [word for entry in ENTRIES for word in re.match(r"\*\*(.+?)\*\*", entry)[1].split(", ")]  # type: ignore[index]
    assert len(ENTRIES) >= 50 and len(set(words)) == len(words)
    for entry in ENTRIES:
        files = re.findall(r"`(llm/[\w/]+\.py)`", entry)
        assert files, entry
        assert all((ROOT / file).is_file() for file in files), files


def test_the_words_that_were_asked_for_are_there() -> None:
    asked = ("Row", "Step", "Micro-batch", "Fragment", "Stage", "Unit", "Replica", "Document", "Sample", "Pack")
    assert [word for word in asked if not any(entry.startswith(f"**{word}**") for entry in ENTRIES)] == []
