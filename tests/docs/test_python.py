"""The Python of every page runs, block after block, names carried over, as a reader would type it."""

import re
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, Block, blocks, text_of
from tests.docs.worlds import encoder_decoder, names_of, stand_in
from tests.shared import ROOT
from tests.siblings.running import run

TESTED_BY = {
    "docs/siblings/components.md": "tests/siblings/test_components_page.py",
    "docs/siblings/hydra.md": "tests/siblings/test_hydra_document.py",
    "docs/siblings/hyformer.md": "tests/siblings/test_hyformer_page.py",
    "docs/siblings/miniformer.md": "tests/siblings/test_miniformer_page.py",
}
"""Pages whose blocks have tests of their own, which know the shapes that they print."""
NOT_RUN = {
    ("docs/export.md", "What there is"): "onnxruntime is not in the environment of runs; tests/export runs its loop",
    ("docs/siblings/miniformer.md", "Lightning"): "Lightning is not in the environment of runs; `make test-full`",
}
"""(page, heading) of blocks that are not run -> why."""


def python(page: str) -> list[Block]:
    return [block for block in blocks(page) if block.language == "python"]


@pytest.mark.parametrize("page", [page for page in PAGES if python(page) and page not in TESTED_BY])
def test_the_python_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch)
    names = names_of(page)
    for block in python(page):
        if (page, block.heading) in NOT_RUN:
            continue
        of_another_model = (page, block.heading) == ("docs/generation.md", "Encoder-decoders")
        kept = names.get("model")
        if of_another_model:
            names["model"] = encoder_decoder()
        try:
            printed = run(block.text, names).splitlines()
        except Exception as error:
            error.add_note(f"in the block at {block.place}")
            raise
        if of_another_model:
            names["model"] = kept
        for line in said(block.text):
            assert line in printed, f"{block.place}: printed {printed}, and not {line!r}"


def said(code: str) -> list[str]:
    """What the comments of a block say that it prints: behind a print, and in the lines at its end."""
    lines = code.splitlines()
    behind = [match[1] for line in lines if (match := re.match(r"\s*print\(.*\)\s+# ([^\[].*)$", line))]
    last = next(i for i, line in enumerate(reversed(lines)) if not line.startswith("# "))
    return behind + [line.removeprefix("# ") for line in lines[len(lines) - last :]]


def test_comments_behind_prints_are_what_is_printed() -> None:
    code = "x = 1  # one\nprint(x)  # 1\nprint(y)  # [2, 3]\nfor i in x:\n    print(i)\n# 4\n# 5"
    assert said(code) == ["1", "4", "5"]


def test_what_is_not_run_is_there() -> None:
    for page, heading in NOT_RUN:
        assert any(block.heading == heading for block in blocks(page)), (page, heading)
    for page, test in TESTED_BY.items():
        assert Path(page).name in (ROOT / test).read_text(), f"{test} is about {page}"
        assert python(page)
    assert all("TODO" not in text_of(page) for page in PAGES)
