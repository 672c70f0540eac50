"""What pages show of dry runs and refusals is what is printed."""

import itertools
from pathlib import Path

import pytest

from llm.errors import UserError
from llm.jobs.pretrain import Pretrain
from tests.docs.commands import commands_of
from tests.docs.pages import Block, blocks
from tests.docs.worlds import stand_in

AS_IF = {"docs/layouts.md": ("--dry_run=config", "--model.vocab_size=8192"), "docs/memory.md": ()}
"""Pages with output of a dry run -> flags for what is not here: the quickstart's tokenizer, of 8,192 pieces."""


def shown_after(page: str) -> tuple[Block, Block]:
    """The first command of a page that is a dry run, and the output that stands under it."""
    pairs = itertools.pairwise(block for block in blocks(page) if block.language in ("sh", "text"))
    return next((a, b) for a, b in pairs if a.language == "sh" and "--dry_run" in a.text and b.language == "text")


def same(shown: str, line: str) -> bool:
    """Whether a line is the one shown, which may end with dots for what is left out."""
    return line.startswith(shown.removesuffix("...").rstrip()) if shown.endswith("...") else line == shown


@pytest.mark.parametrize("page", AS_IF)
def test_a_dry_run_prints_what_the_page_shows(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch)
    for block in blocks(page):
        if block.language == "yaml":
            (tmp_path / "8b.yaml").write_text(block.text)
    command, output = shown_after(page)
    (words,) = commands_of(command.text)
    flags = [word for word in words[2:] if word != "--dry_run" or not AS_IF[page]]
    printed = iter(Pretrain.parse([*flags, *AS_IF[page]]).report().splitlines())
    for shown in output.text.splitlines():
        # in this order: each search goes on where the last one ended
        assert shown == "..." or any(same(shown, line) for line in printed), f"{output.place}: {shown}"


def test_a_layout_that_cannot_work_is_refused_as_the_page_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, monkeypatch)
    (error,) = (block.text for block in blocks("docs/layouts.md") if block.text.startswith("error: "))
    given = "--config configs/pretrain/quickstart.yaml --nproc 6 --parallel.tensor=3 --model.n_heads=8"
    batch = "--train.global_batch_size=12 --train.micro_batch_size=2"
    with pytest.raises(UserError) as caught:
        Pretrain.parse([*given.split(), *batch.split()])
    assert f"error: {caught.value}" == error
