"""Pages can be read: short lines, short pages, links that lead somewhere, blocks of known kinds."""

import pytest

from tests.docs.pages import LANGUAGES, PAGES, anchors, blocks, links, target, text_of
from tests.shared import ROOT

WIDTH, LENGTH = 120, 300
LONG = {"docs/reference.md": "made from the schema, to be searched and not read"}
PENDING: dict[str, str] = {
    page: "not wrapped yet"
    for page in (
        "README.md", "docs/architecture.md", "docs/dropout.md", "docs/evaluation.md", "docs/evaluation_tasks.md",
        "docs/export.md", "docs/extend/README.md", "docs/finetuning.md", "docs/generation.md", "docs/molecules.md",
        "docs/seq2seq.md", "docs/siblings/components.md", "docs/siblings/features.md", "docs/siblings/hydra.md",
        "docs/siblings/hyformer.md", "docs/siblings/miniformer.md", "docs/tasks.md", "docs/values.md",
        "docs/vision.md",
    )
}  # fmt: skip


@pytest.mark.parametrize("page", PAGES)
def test_no_line_and_no_page_is_too_long(page: str) -> None:
    lines = text_of(page).splitlines()
    wide = [f"{page}:{number}: {len(line)}" for number, line in enumerate(lines, 1) if len(line) > WIDTH]
    if page not in PENDING:
        assert wide == []
        assert len(lines) <= LENGTH or page in LONG


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
    assert set(PAGES) - seen - NOT_LINKED_YET == set()


NOT_LINKED_YET = {"docs/reference.md"}


@pytest.mark.parametrize("page", PAGES)
def test_blocks_are_of_known_kinds(page: str) -> None:
    assert {block.language for block in blocks(page)} <= set(LANGUAGES)
    assert text_of(page).count("```") % 2 == 0
