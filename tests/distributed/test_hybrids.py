"""Hybrids of state-space, routed and strided layers train alike on every layout, and go on bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llm import LLM
from tests.distributed.harness import metrics, without_timing, write_text
from tests.distributed.hybrids_job import PATTERNS as CUT_PATTERNS
from tests.distributed.pool import run_job
from tests.distributed.runs import LAYOUTS, Runs, perform

pytestmark = pytest.mark.distributed

STEPS, HALF = 4, 2
PATTERNS = {
    "v1": ["ssm", "attn"],
    "v2": ["ssm", "routed"],
    "v3": ["ssm", "ssm@2", "ssm@4", "attn@4"],
    "parts": ["sum", "none+dense", "ssm+none", "attn+none"],
    "all": ["routed", "ssm@3+moe", "attn@4", "ssm+moe"],
}
MODEL: dict[str, Any] = {
    "n_layers": 4, "layer_pattern": PATTERNS["all"], "dropout": 0.1,
    "ssm": {"d_state": 8, "head_width": 8, "chunk": 16},
    "route": {"rate": 0.3, "max_rate": 0.4, "burst": 2}, "attention_chunk_size": None, "nope_layer_interval": None,
}  # fmt: skip
RUNS = Runs(STEPS, HALF, {"model": MODEL, "optim": {"lr": 1e-2}})
item, assert_alike = RUNS.item, RUNS.assert_alike
CUT: dict[str, Any] = {"parallel": {"tensor": 2}, "micro": 8}
ROUTES = ("route_rate", "route_overflow")
"""Of counts, which are whole numbers."""


def assert_routed_alike(folder: Path, name: str, reference: str) -> None:
    for row, right in zip(metrics(folder / name), metrics(folder / reference), strict=True):
        assert [row.get(key) for key in ROUTES] == [right.get(key) for key in ROUTES], (name, row["step"])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hybrids")
    write_text(folder, documents=80)
    perform(folder, [item(folder, "one")], nproc=1)
    again = item(folder, "again", **CUT, checkpoint=RUNS.half_of(folder, "tensor"))
    zero3 = item(folder, "zero3", parallel={"zero_stage": 3})
    perform(folder, [item(folder, "tensor", **CUT), again, zero3], nproc=2)
    return folder


@pytest.mark.parametrize("name", ["tensor", "zero3"])
def test_a_hybrid_trains_on_ranks_as_on_one_process(runs: Path, name: str) -> None:
    assert_alike(runs, name, "one", 1e-5)  # float32: sums in another order
    assert_routed_alike(runs, name, "one")
    assert all(0 < row["route_rate"] < 0.6 for row in metrics(runs / "one"))


def test_a_resume_goes_on_bit_for_bit_thresholds_too(runs: Path) -> None:
    assert without_timing(metrics(runs / "again")) == without_timing(metrics(runs / "tensor"))[HALF:]
    first, second = (LLM.from_pretrained(runs / name) for name in ("tensor", "again"))
    assert first.thresholds == second.thresholds and len(first.thresholds) == 1
    weights = dict(second.named_parameters())
    assert all(torch.equal(parameter, weights[name]) for name, parameter in first.named_parameters())


@pytest.mark.full
@pytest.mark.parametrize("rate", [0.1, 0.0])
@pytest.mark.parametrize("pattern", ["v1", "v2", "v3", "parts"])
def test_every_layout_trains_alike(tmp_path: Path, pattern: str, rate: float) -> None:
    write_text(tmp_path, documents=80)
    given = {"model": {"layer_pattern": PATTERNS[pattern], "dropout": rate, "moe": None}}
    cuts: dict[str, dict[str, Any]] = {
        "micro 2": {"micro": 2},
        "recomputed": {"train": {"activation_checkpointing": "full"}},
        "selective": {"train": {"activation_checkpointing": "selective"}},
        "compiled": {"train": {"compile": True}},
    }
    layouts = {1: LAYOUTS[1] | cuts, 2: LAYOUTS[2], 4: LAYOUTS[4]}
    for ranks, sections in layouts.items():
        chosen = {name: section for name, section in sections.items() if "expert" not in name}
        items = [item(tmp_path, name, **section | given) for name, section in chosen.items()]
        perform(tmp_path, items, nproc=ranks, timeout=900)
        for name in chosen:
            assert_alike(tmp_path, name, "one process", 1e-5)
            assert_routed_alike(tmp_path, name, "one process")


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, float]]]:
    file = tmp_path_factory.mktemp("cut") / "report.json"
    done = run_job("tests/distributed/hybrids_job.py", str(file), nproc=2)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())


@pytest.mark.parametrize("name", CUT_PATTERNS)
def test_a_hybrid_of_two_ranks_is_the_whole_one_however_its_tokens_come(
    faults: dict[str, list[dict[str, float]]], name: str
) -> None:
    for of_rank in faults[name]:
        assert of_rank and max(of_rank.values()) < 1e-12, of_rank
