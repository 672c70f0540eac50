"""Pages can be read: short lines, short pages, links that lead somewhere, blocks of known kinds."""

import pytest

from tests.docs.pages import LANGUAGES, PAGES, anchors, blocks, links, target, text_of
from tests.shared import ROOT

WIDTH, LENGTH = 120, 300
LONG = {"docs/reference.md": "made from the schema, to be searched and not read"}


@pytest.mark.parametrize("page", PAGES)
def test_no_line_and_no_page_is_too_long(page: str) -> None:
    lines = text_of(page).splitlines()
    wide = [f"{page}:{number}: {len(line)}" for number, line in enumerate(lines, 1) if len(line) > WIDTH]
    assert wide == []
    assert len(lines) <= LENGTH or page in LONG


def test_the_readme_is_a_page_of_80_to_120_lines() -> None:
    assert 80 <= len(text_of("README.md").splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page: str) -> None:
    for link in links(page):
        if link.startswith(("https://", "mailto:")):
            continue
        assert not link.startswith("http:"), f"{page}: {link}"
        path, inside = target(page, link)
        assert path.is_relative_to(ROOT) and path.exists(), f"{page}: {link} leads to no file"
        if inside:
            there = path.relative_to(ROOT).as_posix()
            assert path.suffix == ".md" and inside in anchors(there), f"{page}: {link}: {there} has no such heading"


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen, ahead = set[str](), ["README.md"]
    while ahead:
        page = ahead.pop()
        seen.add(page)
        found = {target(page, link)[0] for link in links(page) if not link.startswith(("https://", "mailto:"))}
        inside = {path.relative_to(ROOT).as_posix() for path in found if path.is_relative_to(ROOT)}
        ahead += sorted((inside & set(PAGES)) - seen)
    assert set(PAGES) - seen == set()


@pytest.mark.parametrize("page", PAGES)
def test_the_fence_of_a_block_says_what_it_is(page: str) -> None:
    assert {block.language for block in blocks(page)} <= set(LANGUAGES)
    assert text_of(page).count("```") % 2 == 0
