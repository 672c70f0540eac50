"""Whole runs on pairs of a source and a target: alike on every layout, packed or not, and after a resume."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from llm import LLM
from tests.distributed.harness import metrics, without_timing
from tests.distributed.runs import LAYOUTS, Runs, perform

pytestmark = [pytest.mark.distributed, pytest.mark.full]

STEPS, HALF = 6, 3
SINGLE = {"data": {"packing": "none"}}
CHECKED = ("loss", "grad_norm", "valid_loss", "valid_ppl", "valid_acc", "tokens", "targets")


def runs_in(folder: Path) -> Runs:
    """Of pairs, with dropout on both sides, MoE layers in them, and sources shorter than targets."""
    pairs = {side: [{"path": str(folder / f"pairs_{side}.jsonl"), "kind": "pair"}] for side in ("train", "valid")}
    return Runs(
        STEPS,
        HALF,
        {
            "model": {"encoder_layers": 2, "n_layers": 2, "dropout": 0.1, "ffn_dropout": 0.1},
            "data": {**pairs, "source_len": 40},
            "eval": {"interval": HALF},
            "optim": {"lr": 3e-3},
        },
    )


def write_pairs(folder: Path) -> None:
    """Texts and what they are backwards, of very different lengths."""
    draw = random.Random(11)
    for side, count in (("train", 300), ("valid", 20)):
        texts = ("".join(draw.choices("abcdefgh ", k=draw.randint(1, 38))) for _ in range(count))
        rows = ({"source": text, "target": text[::-1]} for text in texts)
        (folder / f"pairs_{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def item(runs: Runs, folder: Path, name: str, **given: Any) -> dict[str, Any]:
    """A run; these rows need the task that reads sources."""
    made = runs.item(folder, name, **given)
    made["config"]["task"] = "seq2seq"
    return made


def test_every_layout_trains_alike_and_goes_on_from_every_checkpoint(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    runs = runs_in(tmp_path)
    one = {"one process": {}, "single": SINGLE}
    two = LAYOUTS[2] | {"single on a pipeline": {"parallel": {"pipeline": 2}, **SINGLE}}
    for ranks, sections in ({1: one, 2: two, 4: LAYOUTS[4]}).items():
        items = [item(runs, tmp_path, name, **given) for name, given in sections.items()]
        perform(tmp_path, items, nproc=ranks, timeout=1200)
    for name in [*two, *LAYOUTS[4]]:
        assert_alike(tmp_path, name, "single" if "single" in name else "one process")

    moves = {"pipeline": "ZeRO-3", "ZeRO-3": "tensor", "tensor": "pipeline", "expert": "one process"}
    again = [
        item(runs, tmp_path, f"{name} again", **LAYOUTS[2][name], checkpoint=runs.half_of(tmp_path, name))
        for name in moves
    ]
    moved = [
        item(runs, tmp_path, f"{name} moved", **LAYOUTS[2][name], checkpoint=runs.half_of(tmp_path, source))
        for name, source in moves.items()
    ]
    perform(tmp_path, again + moved, nproc=2, timeout=1200)
    for name in moves:
        rows, expected = metrics(tmp_path / f"{name} again"), metrics(tmp_path / name)
        assert without_timing(rows) == without_timing(expected)[HALF:], name
        first, second = (dict(LLM.from_pretrained(tmp_path / n).named_parameters()) for n in (name, f"{name} again"))
        assert all(torch.equal(first[parameter], second[parameter]) for parameter in first), name
        assert_alike(tmp_path, f"{name} moved", "one process", first=HALF)


def assert_alike(folder: Path, name: str, reference: str, first: int = 0) -> None:
    """What runs say, up to the order of float32 sums."""
    rows, expected = metrics(folder / name), metrics(folder / reference)[first:]
    assert len(rows) == len(expected) == STEPS - first
    for row, right in zip(rows, expected, strict=True):
        assert row["routing_checksum"] == right["routing_checksum"], (name, row["step"])
        for key in CHECKED:
            if key in right:  # only some steps have a validation
                assert row[key] == pytest.approx(right[key], rel=1e-5), (name, row["step"], key)
    assert {"valid_loss", "valid_ppl", "valid_acc"} <= expected[-1].keys()
