"""Whole runs of a test, several in one job: how they are written down, performed and compared."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import metrics, tiny_config
from tests.distributed.pool import run_job

LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"one process": {}},
    2: {
        "ZeRO-1": {},
        "ZeRO-2": {"parallel": {"zero_stage": 2}},
        "ZeRO-2 offload": {"parallel": {"zero_stage": 2, "offload_optimizer": True}},
        "ZeRO-3": {"parallel": {"zero_stage": 3}},
        "ZeRO-3 recomputed": {"parallel": {"zero_stage": 3}, "train": {"activation_checkpointing": "full"}},
        "tensor": {"parallel": {"tensor": 2}, "micro": 8},
        "tensor whole": {"parallel": {"tensor": 2, "sequence_parallel": False}, "micro": 8},
        "pipeline": {"parallel": {"pipeline": 2}},
        "dualpipev": {"parallel": {"pipeline": 2, "pipeline_schedule": "dualpipev"}, "micro": 2},
        "expert": {"parallel": {"expert": 2}},
    },
    4: {
        "tensor x pipeline": {"parallel": {"tensor": 2, "pipeline": 2}, "micro": 8},
        "tensor x expert": {"parallel": {"tensor": 2, "expert": 2}},
        "tensor x ZeRO-3": {"parallel": {"tensor": 2, "zero_stage": 3}},
    },
}
"""Sections of runs of 16 rows a step, by ranks and name; `micro` is the size of a micro-batch where it is not 4."""


@dataclass(frozen=True)
class Runs:
    """What the runs of a test have in common."""

    steps: int
    half: int
    """Step of a checkpoint in the middle."""
    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Of the config, over those of `tiny_config` and under a run's own."""

    def item(self, folder: Path, name: str, *, micro: int = 4, **sections: Any) -> dict[str, Any]:
        """A run as moves_job.py reads it."""
        own = {
            "model": tiny_config(folder)["model"],
            "train": {"steps": self.steps, "micro_batch_size": micro},
            "checkpoint": {"interval": self.half},
            "optim": {"warmup_steps": 1, "ema_decay": 0.9},
        }
        for given in (self.sections, sections):
            own |= {key: {**own.get(key, {}), **section} for key, section in given.items()}
        return {"name": name, "config": tiny_config(folder, **own)}

    def half_of(self, folder: Path, name: str) -> dict[str, Any]:
        """The section `checkpoint` of a run that goes on from the half of another."""
        return {"resume": str(folder / name / "checkpoints" / f"step_{self.half:08d}")}

    def assert_alike(self, folder: Path, name: str, reference: str, rel: float, first: int = 0) -> None:
        """Losses and norms of a run are those of another after its step `first`, up to `rel`."""
        rows, expected = metrics(folder / name), metrics(folder / reference)[first:]
        assert len(rows) == len(expected) == self.steps - first
        for row, right in zip(rows, expected, strict=True):
            for key in ("loss", "grad_norm"):
                assert row[key] == pytest.approx(right[key], rel=rel), (name, row["step"], key)


def perform(folder: Path, items: list[dict[str, Any]], nproc: int, timeout: float = 240) -> None:
    """The runs one after the other in one job, each in the folder of its name."""
    file = folder / f"plan{nproc}.json"
    file.write_text(json.dumps(items))
    done = run_job("tests/distributed/moves_job.py", str(file), str(folder), nproc=nproc, timeout=timeout)
    assert done.returncode == 0, done.stderr
