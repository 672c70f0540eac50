"""docs/memory.md: what its table quotes of dry runs is what they print, and its bytes of activations are those that a
forward keeps."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker

from llm import LLM, ModelArgs
from llm.jobs.pretrain import Pretrain
from tests.docs.pages import blocks, text_of

PAGE = "docs/memory.md"
ROWS = re.findall(r"^\| (`--[^|]*`|\(none\)) \| ([\d.]+) \| \d+ \| ([\d.]+ \w+) \|", text_of(PAGE), flags=re.M)
BYTES = {mode: int(n) for mode, n in re.findall(r"^\| `(none|selective|full)` \| (\d+)", text_of(PAGE), flags=re.M)}


def dry_run(folder: Path, *flags: str) -> str:
    (config,) = (block.text for block in blocks(PAGE) if block.language == "yaml")
    (folder / "8b.yaml").write_text(config)
    words = ["--config", str(folder / "8b.yaml"), "--nproc", "8", "--dry_run=config", *flags]
    return Pretrain.parse(words).report()


@pytest.mark.parametrize(("flags", "kept", "sent"), ROWS, ids=[flags for flags, _, _ in ROWS])
def test_a_row_of_the_table_is_what_a_dry_run_says(tmp_path: Path, flags: str, kept: str, sent: str) -> None:
    printed = dry_run(tmp_path, *(() if flags == "(none)" else flags.strip("`").split()))
    assert re.findall(r"#   all +[\d,to ]+  ([\d.]+) GiB$", printed, flags=re.M)[0] == kept
    *_, total = re.findall(r"^#   \w+ +[\d,]+  ([\d.]+ \w+), ", printed, flags=re.M)
    assert total == sent


def kept(mode: Any, n_layers: int, tokens: int, dim: int) -> int:
    """Bytes that the forward of such a model keeps for its backward, beside its weights."""
    heads = {"n_heads": dim // 64, "n_kv_heads": dim // 256}
    args = ModelArgs(dim=dim, n_layers=n_layers, ffn_hidden=7 * dim // 2, vocab_size=256, **heads)
    model = LLM(args).to(torch.bfloat16).train()
    model.activation_checkpointing = mode
    ids = torch.randint(0, 256, (1, tokens))
    tracker = MemTracker()
    tracker.track_external(model)
    with tracker:
        out = model(ids, labels=ids)
        found = sum(kind["Total"] for kind in tracker.get_tracker_snapshot("current").values())
    assert out.loss_sum is not None
    return int(found) - sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.parametrize("mode", BYTES)
def test_a_layer_keeps_the_bytes_that_the_page_says(mode: str) -> None:
    """Statistics of norms and attention are a few float32 numbers a token, which are rounded away."""
    tokens, dim = 128, 256
    layer = kept(mode, 3, tokens, dim) - kept(mode, 2, tokens, dim)
    assert layer / tokens / dim == pytest.approx(BYTES[mode], abs=0.2)
