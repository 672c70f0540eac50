"""Every command on a page is one that its program takes: script, flags, keys, targets and files of ours exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llm.errors import UserError
from tests.docs.commands import check, commands_of
from tests.docs.pages import Block, all_blocks, blocks, text_of
from tests.docs.worlds import stand_in
from tests.shared import ROOT

UNREAD = {
    ("docs/siblings/miniformer.md", "The command"): "flags of another project, which its own tests know",
}
"""(page, heading) of blocks whose commands are not parsed here -> why."""


@pytest.mark.parametrize("block", all_blocks("sh"), ids=lambda block: block.place)
def test_commands_are_read_by_their_programs(block: Block) -> None:
    commands = list(commands_of(block.text))
    assert commands
    for words in commands if (block.page, block.heading) not in UNREAD else []:
        try:
            check(words)
        except (UserError, AssertionError) as error:
            raise AssertionError(f"{block.place}: {' '.join(words)}: {error}") from error


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("python launch/pretrain.py --config configs/pretrain/quickstart.yaml --optim.lrr=1", "optim.lrr"),
        ("python launch/pretrain.py --config configs/pretrain/nothing.yaml", "nothing.yaml"),
        ("python launch/evaluate.py --model A --tasks nothing --output B", "nothing"),
        ("python tools/convert.py export A B --format onnx --fast", "unknown flag --fast"),
        ("torchrun --nproc_per_node=2 launch/nothing.py", "no such script"),
        ("make everything", "the Makefile has no everything"),
        ("frobnicate", "does not know"),
    ],
)
def test_what_no_program_takes_is_found(command: str, problem: str) -> None:
    (words,) = commands_of(command)
    with pytest.raises((UserError, AssertionError), match=problem):
        check(words)


RUN = {
    "docs/generation.md": (),
    "docs/memory.md": (),
    "docs/model.md": (),
    "docs/publishing.md": ("hf", "evaluate"),
}
"""Pages whose commands are run as they stand -> words of those that are not: they send something, or want data."""


@pytest.mark.full
@pytest.mark.parametrize("page", RUN)
def test_commands_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch)
    for block in blocks(page):
        said = text_of(page).splitlines()[max(0, block.line - 3)]
        if block.language == "yaml" and (name := re.search(r"`(\S+\.yaml)` ", said)):
            (tmp_path / name[1]).write_text(block.text)
        for words in commands_of(block.text) if block.language == "sh" else ():
            if set(words[:2]) & set(RUN[page]):
                continue
            name = Path(words[0]).name
            python = [sys.executable]
            program = {"python": python, "lattice": [*python, "-m", "llm"]}.get(name, [name])
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            done = subprocess.run([*program, *words[1:]], capture_output=True, text=True, env=environment, check=False)
            assert done.returncode == 0, f"{block.place}: {' '.join(words)}: {done.stderr}"
