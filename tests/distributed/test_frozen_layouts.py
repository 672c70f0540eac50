"""Kinds of parameters with the learning-rate factor 0 count in no norm and keep no moments, on every layout."""

import json
from pathlib import Path
from typing import Any

import pytest

from llm.args import ModelArgs
from llm.checkpoint.reader import Checkpoint
from llm.parameters import ParameterTable
from tests.distributed.harness import TINY_MODEL, metrics, run, tiny_config, write_text

pytestmark = [pytest.mark.distributed, pytest.mark.full]

FROZEN = ("embedding", "matrix", "router")
STEPS = 6
LAYOUTS: dict[int, dict[str, tuple[int, dict[str, Any]]]] = {
    1: {"one": (4, {})},
    2: {
        "ZeRO-1": (4, {}),
        "ZeRO-2": (4, {"zero_stage": 2}),
        "ZeRO-2 offload": (4, {"zero_stage": 2, "offload_optimizer": True}),
        "ZeRO-3": (4, {"zero_stage": 3}),
        "tensor": (8, {"tensor": 2}),
        "pipeline": (4, {"pipeline": 2}),
        "expert": (4, {"expert": 2}),
    },
}
"""Ranks, and by name: micro-batch and `parallel`."""


@pytest.mark.parametrize(("optimizer", "tied"), [("adamw", False), ("adamw", True), ("muon", False)])
def test_every_layout_freezes_alike(tmp_path: Path, optimizer: str, tied: bool) -> None:
    write_text(tmp_path, documents=80)
    names = []
    for ranks, layouts in LAYOUTS.items():
        plan = []
        for name, (micro_batch, parallel) in layouts.items():
            config = tiny_config(
                tmp_path,
                parallel=parallel,
                model={**tiny_config(tmp_path)["model"], "tie_embeddings": tied},
                optim={"name": optimizer, "warmup_steps": 1, "lr_factors": dict.fromkeys(FROZEN, 0.0)},
                train={"steps": STEPS, "micro_batch_size": micro_batch},
            )
            names.append(f"{ranks} {name}")
            plan.append({"name": names[-1], "config": config})
        plain = tiny_config(tmp_path, optim={"warmup_steps": 1}, train={"steps": 2}) if ranks == 1 else None
        if plain:
            plan.append({"name": "plain", "config": plain})
        file = tmp_path / "plan.json"
        file.write_text(json.dumps(plan))
        done = run("tests/distributed/moves_job.py", str(file), str(tmp_path), nproc=ranks, timeout=900)
        assert done.returncode == 0, done.stderr
    expected = metrics(tmp_path / names[0])
    assert len(expected) == STEPS and expected[0]["loss"] != expected[-1]["loss"]
    if not tied:
        everything = metrics(tmp_path / "plain")[0]["grad_norm"]
        assert expected[0]["grad_norm"] < 0.9 * everything, "the frozen ones are missing"
    for name in names:
        for row, right in zip(metrics(tmp_path / name), expected, strict=True):
            for key in ("loss", "grad_norm"):  # float32: sums in another order
                assert row[key] == pytest.approx(right[key], rel=1e-5), (name, row["step"], key)
        kinds = Checkpoint.open(tmp_path / name / "checkpoints" / f"step_{STEPS:08d}").kinds()
        table = ParameterTable.of(ModelArgs.model_validate({**TINY_MODEL, "vocab_size": 259, "tie_embeddings": tied}))
        for parameter, kept in kinds.items():
            assert (kept == {"master"}) == (table[parameter].kind in FROZEN), (name, parameter, kept)
