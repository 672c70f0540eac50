"""Muon, and norms of queries and keys with weights, under tensor and expert parallelism: the answer of one process."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.pool import run_job

pytestmark = pytest.mark.distributed

EQUAL = 1e-5  # float32 sums in another order

# larger weights than usual: attention must matter for the gradient norm to show a wrong gradient
HEAD, FULL = {"qk_norm": "head", "init_std": 0.2}, {"qk_norm": "full", "init_std": 0.2}
CASES: list[dict[str, Any]] = [  # on four ranks; where tensor is 4, the two kv heads are whole on all of them
    {"tensor": 2, "stage": 1, "optimizer": "muon"},
    {"tensor": 2, "stage": 3, "optimizer": "muon", "tied": True},
    {"tensor": 4, "stage": 1, "optimizer": "muon", "tied": True},
    {"tensor": 4, "stage": 3, "optimizer": "muon"},
    {"expert": 2, "stage": 1, "optimizer": "muon", "tied": True},
    {"expert": 4, "stage": 2, "optimizer": "muon"},
    {"tensor": 2, "expert": 2, "stage": 2, "optimizer": "muon"},
    {"tensor": 2, "stage": 1, "model": FULL, "optimizer": "sgd"},
    {"tensor": 4, "stage": 1, "model": FULL, "optimizer": "sgd"},
    {"tensor": 4, "stage": 3, "model": FULL, "optimizer": "muon", "recompute": "full", "sequence_parallel": False},
    {"tensor": 2, "stage": 2, "model": HEAD, "optimizer": "sgd", "sequence_parallel": False},
    {"tensor": 4, "stage": 1, "model": HEAD, "optimizer": "sgd"},
]  # fmt: skip


def train(folder: Path, cases: list[dict[str, Any]], nproc: int) -> list[list[dict[str, Any]]]:
    file, out = folder / f"cases{nproc}.json", folder / f"out{nproc}.json"
    file.write_text(json.dumps([{**case, "steps": 4} for case in cases]))
    done = run_job("tests/distributed/muon_layouts_job.py", str(file), str(out), nproc=nproc)
    assert done.returncode == 0, done.stderr
    return list(json.loads(out.read_text()))


def uncut(case: dict[str, Any]) -> dict[str, Any]:
    return {key: case[key] for key in ("optimizer", "model", "tied") if key in case}


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    models = {json.dumps(uncut(case)): uncut(case) for case in CASES}
    rows = train(tmp_path_factory.mktemp("one"), list(models.values()), 1)
    return dict(zip(models, rows, strict=True))


@pytest.mark.parametrize(
    "cases",
    [CASES[1::4], pytest.param(CASES[::2] + CASES[3::4], marks=pytest.mark.full)],
    ids=["a quarter", "the rest"],
)
def test_four_ranks_equal_one_process(
    tmp_path: Path, references: dict[str, list[dict[str, Any]]], cases: list[dict[str, Any]]
) -> None:
    for case, rows in zip(cases, train(tmp_path, cases, 4), strict=True):
        for step, (row, right) in enumerate(zip(rows, references[json.dumps(uncut(case))], strict=True)):
            assert row["skipped"] is None
            assert row["checksum"] == right["checksum"], (case, step)
            for key in ("loss", "grad_norm"):
                assert row[key] == pytest.approx(right[key], rel=EQUAL), (case, step, key)
