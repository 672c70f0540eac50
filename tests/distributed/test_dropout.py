"""Dropout drops the same on every layout, however rows are cut into micro-batches, and after a resume."""

from pathlib import Path
from typing import Any

import pytest
import torch

from llm import LLM
from tests.distributed.harness import metrics, without_timing, write_text
from tests.distributed.runs import LAYOUTS, Runs, perform

pytestmark = pytest.mark.distributed

STEPS, HALF = 4, 2
RATES = {"dropout": 0.1, "ffn_dropout": 0.1}
RUNS = Runs(STEPS, HALF, {"model": RATES, "optim": {"lr": 1e-2}})
item, half_of, assert_alike = RUNS.item, RUNS.half_of, RUNS.assert_alike
OFF = {"model": dict.fromkeys(RATES, 0.0)}
CUT = {"parallel": {"tensor": 2}, "micro": 8}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts and all places of a block: on one process, cut by tensor and sequence, and from the half of that."""
    folder = tmp_path_factory.mktemp("dropout")
    write_text(folder, documents=80)
    perform(folder, [item(folder, "one"), item(folder, "off", **OFF, train={"steps": 1})], nproc=1)
    again = item(folder, "again", **CUT, checkpoint={"resume": half_of(folder, "tensor")["resume"]})
    perform(folder, [item(folder, "tensor", **CUT), again], nproc=2)
    return folder


def test_ranks_that_cut_heads_and_sequence_drop_as_one_process_does(runs: Path) -> None:
    assert_alike(runs, "tensor", "one", 1e-5)  # float32: sums in another order
    dropped, plain = (metrics(runs / name)[0] for name in ("one", "off"))
    assert abs(dropped["grad_norm"] / plain["grad_norm"] - 1) > 1e-3, "other masks would show"


def test_a_resume_drops_bit_for_bit_as_the_run_that_goes_on(runs: Path) -> None:
    assert without_timing(metrics(runs / "again")) == without_timing(metrics(runs / "tensor"))[HALF:]
    first, second = (dict(LLM.from_pretrained(runs / name).named_parameters()) for name in ("tensor", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.full
def test_every_layout_drops_alike(tmp_path: Path) -> None:
    write_text(tmp_path, documents=80)
    schedule = {"seq_len_schedule": [[0, 24], [32, 48]]}
    cuts: dict[str, dict[str, Any]] = {
        "micro 1": {"micro": 1},
        "micro 2": {"micro": 2},
        "micro 16": {"micro": 16},
        "recomputed": {"train": {"activation_checkpointing": "full"}},
        "selective": {"train": {"activation_checkpointing": "selective"}},
        "compiled": {"train": {"compile": True}},
        "short": {"train": schedule},
    }
    expected = {"one process": "one process", **dict.fromkeys(cuts, "one process"), "short": "short"}
    layouts = {1: LAYOUTS[1] | cuts, 2: LAYOUTS[2] | {"short 2": {**CUT, "train": schedule}}, 4: LAYOUTS[4]}
    for ranks, sections in layouts.items():
        perform(tmp_path, [item(tmp_path, name, **given) for name, given in sections.items()], nproc=ranks, timeout=900)
        for name in sections:
            assert_alike(tmp_path, name, expected.get(name, "short" if "short" in name else "one process"), 1e-5)
