"""The code on docs/siblings/miniformer.md runs as it stands there, the shapes in its comments hold, and its tables have
all keys and flags."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from llm.siblings.miniformer_command import Flags
from llm.siblings.miniformer_config import TransformerConfig
from tests.shared import ROOT
from tests.siblings.running import run
from tests.siblings.seeds import blocks_of_file

PAGE = ROOT / "docs" / "siblings" / "miniformer.md"


def test_every_block_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    blocks, names = blocks_of_file(PAGE), dict[str, Any]()
    for block in blocks:
        if block.language == "python":
            run(block.text, names)
    assert names["written"].shape[0] == 2 and names["written"].shape[1] <= 6
    assert torch.isfinite(names["loss"])
    others = [block.heading for block in blocks if block.language != "python"]
    assert others == ["The command", "Lightning"], "a shell's, and what needs another package"


def test_every_flag_and_key_is_explained() -> None:
    text = PAGE.read_text(encoding="utf-8")
    flags = {field.name for field in dataclasses.fields(Flags)}
    assert {name for name in flags if f"--{name}" not in text} == set()
    keys = {field.name for field in dataclasses.fields(TransformerConfig)}
    assert {key for key in keys if not re.search(rf"`{key}`", text)} == set()
