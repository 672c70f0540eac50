"""docs/siblings/features/: what they name exists, what they quote stands in the documents, no feature is left out."""

import re
from typing import NamedTuple

import pytest

from tests.shared import ROOT
from tests.siblings.seeds import needs_seeds, seed

PAGES = sorted((ROOT / "docs" / "siblings" / "features").glob("*.md"))
LISTS = {
    "000": ("Overview", "Features", "Key Components", "Performance Considerations"),
    "001": ("Features", "Implementation Features", "Cache Lifecycle", "Routing Algorithm", "Best Practices",
            "Integration"),
    "002": ("Performance Tips",),
    "003": ("Features", "Data Module", "Lightning Module", "Trainer Script", "Encoder-Only Transformer",
            "Seq2Seq Transformer", "Future Scope"),
    "004": ("Key Features",),
}  # fmt: skip
"""Headings under which a document lists features, each with a name in bold."""


class Feature(NamedTuple):
    """An item of a page; `tests` has each test as FILE::NAME, and FILE alone where all of it are meant."""

    seed: str
    text: str
    where: str
    tests: str


def features() -> list[Feature]:
    found = []
    for page in PAGES:
        text = re.sub(r"\n +(?![ -])", " ", page.read_text(encoding="utf-8"))  # an item goes on indented
        heading, *items = re.split(r"^- ", text, flags=re.MULTILINE)
        for item in items:
            text, where, *tests = [part.strip() for part in item.split("\n  - ")]
            assert len(tests) < 2 and all(part.startswith("tests: ") for part in tests), item
            found.append(Feature(heading.removeprefix("# ")[:3], text, where, with_files("".join(tests))))
    return found


def with_files(tests: str) -> str:
    """The code spans of a list of tests, each test behind the file that was named before it."""
    names, file = dict[str, None](), ""
    for name in re.findall(r"`([^`]+)`", tests):
        if name.startswith("test_"):
            names.pop(file, None)
            names[f"{file}::{name}"] = None
        else:
            file, names[name] = name, None
    return ", ".join(f"`{name}`" for name in names)


FEATURES = features()
NAMED = sorted({name for feature in FEATURES for name in re.findall(r"`([^`]+)`", f"{feature.where} {feature.tests}")})


@pytest.mark.parametrize("name", NAMED)
def test_every_file_and_test_exists(name: str) -> None:
    path, *function = name.split("::")
    if path.startswith("make "):
        path, target = "Makefile", path.removeprefix("make ")
        assert f"\n{target}:" in (ROOT / path).read_text(encoding="utf-8")
    assert (ROOT / path).exists()
    assert all(f"def {one}(" in (ROOT / path).read_text(encoding="utf-8") for one in function)


def test_every_feature_has_a_file_and_a_test_or_says_why_not() -> None:
    for feature in FEATURES:
        absent = re.fullmatch(r"not yet: issue M/N|declined: .{20,}", feature.where)
        files, tests = re.findall(r"`[^`]+`", feature.where), re.findall(r"`(?:tests/|make lint)[^`]*`", feature.tests)
        assert (absent is not None and not feature.tests) or (files and tests), feature


def test_what_is_done_promises_nothing_for_later() -> None:
    done = [feature for feature in FEATURES if feature.seed in ("000", "001", "003", "004")]
    assert not [feature for feature in done if "not yet" in feature.where]


@needs_seeds
def test_what_is_quoted_stands_in_the_document() -> None:
    for feature in FEATURES:
        text = plain(seed(feature.seed))
        for quoted in re.findall(r'"([^"]+)"', feature.text):
            assert plain(quoted) in text, feature


@needs_seeds
@pytest.mark.parametrize("number", LISTS)
def test_no_listed_feature_is_left_out(number: str) -> None:
    page = plain(" ".join(feature.text for feature in FEATURES if feature.seed == number))
    listed = [name for heading in LISTS[number] for name in bold_under(seed(number), heading)]
    assert listed and not [name for name in listed if plain(name) not in page]


def bold_under(text: str, heading: str) -> list[str]:
    """Names in bold that begin an item of a list under a heading, or under each that is called so."""
    found, inside = [], False
    for line in text.splitlines():
        if line.startswith("#"):
            inside = line.strip("# ").strip() == heading
        elif inside and (match := re.match(r"\s*(?:-|\*|\d+\.)\s+.*?\*\*(.+?):?\*\*", line)):
            found.append(match[1])
    return found


def plain(text: str) -> str:
    """Letters, digits and single spaces: documents differ in marks, dashes and signs that no reader misses."""
    return " ".join(re.sub(r"[^A-Za-z0-9_.&]+", " ", text).split())
