"""Every ZeRO stage, optimizer and precision gives the answer of one process with nothing cut."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.pool import run_job
from tests.machine import needs, possible

pytestmark = pytest.mark.distributed

# float32 sums in another order, as in test_equality.py
FP32 = 1e-5
# bf16 rounds to 8 bits, 2e-3 relative per value and step; the norm is a sum of squares of rounded gradients
BF16 = 1e-2
BF16_MEAN = 2e-3  # what does not average out over steps would be a bias
# fp16 has 11 bits: 2.4e-4
FP16 = 2e-3

REFERENCE = [
    {"optimizer": "adamw", "tied": False},
    {"optimizer": "sgd", "tied": False},
    {"optimizer": "sgd", "tied": True},
    {"optimizer": "muon", "tied": False},
]
"""What the cases are compared with."""
ON_TWO_RANKS: list[dict[str, Any]] = [
    {"stage": 0, "optimizer": "adamw", "accumulation": 2},
    {"stage": 1, "optimizer": "muon"},
    {"stage": 2, "optimizer": "adamw", "accumulation": 2},
    {"stage": 2, "optimizer": "sgd"},
    {"stage": 2, "optimizer": "adamw", "accumulation": 2, "offload": True},
    {"stage": 3, "optimizer": "adamw", "accumulation": 2, "recompute": "selective"},
    {"stage": 3, "optimizer": "sgd", "tied": True},
    {"stage": 3, "optimizer": "muon"},
    {"stage": 3, "optimizer": "adamw", "offload": True},
    {"stage": 1, "precision": "bf16", "accumulation": 4},
    {"stage": 2, "precision": "bf16", "accumulation": 2, "recompute": "selective"},
    {"stage": 3, "precision": "bf16", "recompute": "full"},
    {"stage": 1, "precision": "fp16"},
    {"stage": 3, "precision": "fp16", "accumulation": 2},
]
EVERYTHING: list[dict[str, Any]] = [
    {"stage": stage, "optimizer": optimizer, "precision": precision, "accumulation": accumulation, "steps": 20}
    for stage, optimizer, precision, accumulation in itertools.product(
        (1, 2, 3), ("adamw", "sgd", "muon"), ("fp32", "bf16", "fp16"), (1, 2)
    )
] + [
    {"stage": stage, "optimizer": "adamw", "precision": precision, **memory, "steps": 20}
    for stage, precision, memory in itertools.product(
        (1, 2, 3), ("fp32", "bf16"), ({"recompute": "selective"}, {"recompute": "full"}, {"compile": True})
    )
]


def train(folder: Path, cases: list[dict[str, Any]], nproc: int) -> list[list[dict[str, Any]]]:
    """The rows of each case; none where this device lacks the case's precision."""
    file, out = folder / "cases.json", folder / f"out{nproc}.json"
    file.write_text(json.dumps(possible(cases)))
    done = run_job("tests/distributed/engine_job.py", str(file), str(out), nproc=nproc, timeout=1500)
    assert done.returncode == 0, done.stderr
    found = iter(json.loads(out.read_text()))
    return [next(found) if possible([case]) else [] for case in cases]


def reference(folder: Path, steps: int) -> dict[tuple[str, bool], list[dict[str, Any]]]:
    rows = train(folder, [{**case, "steps": steps} for case in REFERENCE], 1)
    return {(str(case["optimizer"]), bool(case["tied"])): r for case, r in zip(REFERENCE, rows, strict=True)}


def check(case: dict[str, Any], rows: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    precision = case.get("precision", "fp32")
    bound = {"fp32": FP32, "bf16": BF16, "fp16": FP16}[precision]
    assert len(rows) == len(expected)
    for step, (row, right) in enumerate(zip(rows, expected, strict=True)):
        assert row["skipped"] is None
        for key in ("loss", "grad_norm"):
            assert row[key] == pytest.approx(right[key], rel=bound), (case, step, key)
        if precision == "fp32":  # rounding decides close routing votes
            assert (row["checksum"], row["overflow"]) == (right["checksum"], right["overflow"]), (case, step)
    off = [row["loss"] / right["loss"] - 1 for row, right in zip(rows, expected, strict=True)]
    assert abs(sum(off) / len(off)) < BF16_MEAN, (case, off)


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], list[dict[str, Any]]]:
    return reference(tmp_path_factory.mktemp("reference"), 12)


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    return train(tmp_path_factory.mktemp("two"), ON_TWO_RANKS, 2)


@pytest.mark.parametrize("number", range(len(ON_TWO_RANKS)), ids=lambda i: "-".join(map(str, ON_TWO_RANKS[i].values())))
def test_two_ranks_equal_one_process(
    references: dict[tuple[str, bool], list[dict[str, Any]]], on_two_ranks: list[list[dict[str, Any]]], number: int
) -> None:
    case = ON_TWO_RANKS[number]
    needs(case.get("precision", "fp32"))
    check(case, on_two_ranks[number], references[case.get("optimizer", "adamw"), case.get("tied", False)])


def test_the_reference_learns_and_clips(references: dict[tuple[str, bool], list[dict[str, Any]]]) -> None:
    for name in ("adamw", "muon"):
        rows = references[name, False]
        assert rows[-1]["loss"] < rows[0]["loss"] - 0.03
    assert all(row["grad_norm"] > 0.5 for row in references["adamw", False][:3]), "clipping at 0.5 must bite"


@pytest.mark.full
@pytest.mark.parametrize("nproc", [1, 2, 4])
def test_every_stage_optimizer_and_precision(tmp_path: Path, nproc: int, subtests: pytest.Subtests) -> None:
    expected = reference(tmp_path, 20)
    for case, rows in zip(EVERYTHING, train(tmp_path, EVERYTHING, nproc), strict=True):
        with subtests.test(**case):
            needs(case.get("precision", "fp32"))
            check(case, rows, expected[case["optimizer"], False])
