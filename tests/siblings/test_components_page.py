"""The code on docs/siblings/components.md runs as it stands there, and the shapes in its comments hold."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.shared import ROOT
from tests.siblings.running import run
from tests.siblings.seeds import blocks_of_file

PAGE = ROOT / "docs" / "siblings" / "components.md"


def test_every_block_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    blocks, names = blocks_of_file(PAGE), dict[str, Any]()
    for block in blocks:
        run(block.text, names)
        if "loss" in names:
            assert torch.isfinite(names["loss"]), block.heading
    assert len(blocks) == 8 and {block.language for block in blocks} == {"python"}
