"""Objectives from a file outside of the project, and the losses of two sources: the same on every layout."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import ROOT, metrics, tiny_config, write_config, write_text
from tests.distributed.pool import run_job

pytestmark = pytest.mark.distributed

LAYOUTS: dict[int, dict[str, Any]] = {
    1: {"one": {}},
    2: {"tensor": {"tensor": 2}, "pipeline": {"pipeline": 2}, "zero3": {"zero_stage": 3}},
}
KEYS = ("loss", "lm_loss", "two_ahead_loss", "small_hidden_loss", "loss/first", "loss/second", "grad_norm")
STEPS = 4
RELATIVE = 1e-5  # float32 sums in another order, as in test_equality.py


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("objectives")
    write_text(folder, documents=120)
    lines = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    for name, part in (("first", lines[:40]), ("second", lines[40:])):
        (folder / f"{name}.jsonl").write_text("".join(part))
    sources = [{"path": str(folder / f"{name}.jsonl"), "name": name} for name in ("first", "second")]
    raw = tiny_config(
        folder,
        data={"train": sources},
        train={"steps": STEPS, "objectives": {"two_ahead": {"weight": 0.3}, "small_hidden": {"weight": 0.1}}},
    )
    raw["extensions"] = [str(ROOT / "docs/extend/two_ahead.py")]
    config = write_config(folder / "config.yaml", raw)
    for nproc, layouts in LAYOUTS.items():
        done = run_job(
            "tests/distributed/objectives_job.py", str(config), str(folder), json.dumps(layouts), nproc=nproc
        )
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("layout", LAYOUTS[2])
def test_added_objectives_and_losses_of_sources_are_the_same_on_every_layout(runs: Path, layout: str) -> None:
    expected, found = metrics(runs / "one"), metrics(runs / layout)
    assert len(expected) == len(found) == STEPS
    for row, right in zip(found, expected, strict=True):
        assert row.keys() == right.keys()
        assert {key: row[key] for key in KEYS} == pytest.approx({key: right[key] for key in KEYS}, rel=RELATIVE)
        assert row["routing_checksum"] == right["routing_checksum"]


def test_a_steps_loss_is_the_sum_of_its_objectives_and_lies_between_its_sources(runs: Path) -> None:
    for row in metrics(runs / "one"):
        parts = [value for key, value in row.items() if key.endswith("_loss") and not key.startswith("valid")]
        assert len(parts) == 5 and row["loss"] == pytest.approx(sum(parts), rel=1e-12)
        low, high = sorted([row["loss/first"], row["loss/second"]])
        assert low <= row["lm_loss"] <= high


def test_weights_are_in_the_losses_that_are_recorded(runs: Path) -> None:
    """Before the first update a token and the one after it are as hard to foresee: about the logarithm of the
    vocabulary, times the weight. Final hidden states are normed: their mean square is 1, but for norm_eps, times the
    weight.
    """
    first = metrics(runs / "one")[0]
    assert first["two_ahead_loss"] == pytest.approx(0.3 * first["lm_loss"], rel=0.05)
    assert first["small_hidden_loss"] == pytest.approx(0.1, rel=0.05)
