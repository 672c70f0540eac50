"""A run moves between all ZeRO stages by its checkpoints, with every optimizer state and the averaged weights."""

import json
from pathlib import Path

import pytest
import torch

from llm import LLM
from llm.checkpoint.reader import Checkpoint
from tests.distributed.harness import metrics, tiny_config, write_config, write_text
from tests.distributed.pool import run_job
from tests.distributed.stages_job import JOURNEYS
from tests.machine import has

pytestmark = pytest.mark.distributed

RELATIVE = 1e-5  # as in test_equality.py


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    write_text(folder)
    config = tiny_config(
        folder,
        optim={"schedule": "constant", "ema_decay": 0.75, "lr_factors": {"embedding": 2.0}},
        eval={"interval": 8, "sample_interval": 8, "sample_tokens": 8},
    )
    words = [str(write_config(folder / "c.yaml", config)), str(folder)]
    done = run_job("tests/distributed/stages_job.py", *words, nproc=2)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("optimizer", JOURNEYS)
def test_every_stage_goes_on_where_another_stopped(runs: Path, optimizer: str) -> None:
    moved, whole = metrics(runs / f"{optimizer}-moved"), metrics(runs / f"{optimizer}-whole")
    assert [row["step"] for row in moved] == list(range(1, 17))
    for row, expected in zip(moved, whole, strict=True):
        for key in ("loss", "grad_norm"):
            assert row[key] == pytest.approx(expected[key], rel=RELATIVE), (row["step"], key)
        assert row["routing_checksum"] == expected["routing_checksum"]
    for key in ("valid_loss", "valid_loss_ema"):
        assert moved[-1][key] == pytest.approx(whole[-1][key], rel=RELATIVE)
    assert "sample at step 8" in (runs / f"{optimizer}-moved" / "log.txt").read_text()  # made under ZeRO-3 or 2


@pytest.mark.parametrize("optimizer", JOURNEYS)
def test_states_and_averages_arrive(runs: Path, optimizer: str) -> None:
    moved, whole = (
        Checkpoint.open(runs / f"{optimizer}-{name}" / "checkpoints" / "step_00000016") for name in ("moved", "whole")
    )
    assert moved.kinds() == whole.kinds()
    has_momentum = {name for name, kinds in whole.kinds().items() if "momentum_buffer" in kinds}
    assert bool(has_momentum) == (optimizer == "muon")
    for name, kinds in whole.kinds().items():
        assert "ema" in kinds and (("exp_avg" in kinds) != (name in has_momentum))
        for kind in kinds:
            found, expected = moved.read(name, kind), whole.read(name, kind)
            # Adam divides small gradients by their own size, so what they differ in by rounding comes out larger
            assert float((found - expected).norm()) <= 1e-3 * float(expected.norm()) + 1e-12, (name, kind)


def test_the_average_is_read_back_without_deepspeed(runs: Path) -> None:
    path = runs / "muon-moved"
    plain, average = LLM.from_pretrained(path), LLM.from_pretrained(path, average=True)
    checkpoint = Checkpoint.open(path / "checkpoints" / "step_00000016")
    name = "layers.0.attention.wq.weight"
    assert torch.equal(average.get_parameter(name).flatten(), checkpoint.read(name, "ema"))
    assert not torch.equal(average.get_parameter(name), plain.get_parameter(name))


def test_optimizer_precision_and_average_change_where_that_is_allowed(runs: Path) -> None:
    if not has("fp16") and not has("bf16"):
        pytest.skip("this device has neither fp16 nor bf16 arithmetic")
    rows = metrics(runs / "changed")
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert all(row["skipped"] is None for row in rows) and rows[-1]["loss_scale"] is None
    kinds = Checkpoint.open(runs / "changed" / "checkpoints" / "step_00000008").kinds()
    assert all(kept == {"master", "exp_avg", "exp_avg_sq", "ema"} for kept in kinds.values())
    assert not list((runs / "changed" / "checkpoints").glob("damaged_*"))


def test_the_average_follows_its_formula_and_is_only_lent(runs: Path) -> None:
    assert json.loads((runs / "average.json").read_text()) == {"formula": True, "restored": True, "lent": True}
