"""Whole runs with experts that can be full, and dropout, for each task with an encoder or with values: alike on data,
tensor, pipeline and expert ranks and under ZeRO 3, and after a resume the same bits.

Which assignments a full expert admits hangs on the order of tokens in a row alone, so it is the same however rows are
dealt to ranks and micro-batches.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.distributed import test_seq2seq_runs as pairs
from tests.distributed import test_values as values
from tests.distributed.harness import TINY_MODEL, metrics, without_timing
from tests.distributed.runs import LAYOUTS, perform

pytestmark = [pytest.mark.distributed, pytest.mark.full]

FULL = {**TINY_MODEL["moe"], "overflow": True}
NAMES = ("ZeRO-1", "ZeRO-3", "tensor", "pipeline", "expert")
RESUMED = "ZeRO-3"


def item(folder: Path, task: str, name: str, **given: Any) -> dict[str, Any]:
    """A run; its experts take fewer assignments of a long row than an even choice gives them, so that some are full."""
    if task == "seq2seq":
        sections = {"model": {"moe": {**FULL, "capacity": 10}}, **given}
        return pairs.item(pairs.runs_in(folder), folder, f"{task} {name}", **sections)
    sections = {"model": {"moe": {**FULL, "capacity": 2}}, **given}
    return values.item(folder, task, name, **sections)


@pytest.mark.parametrize("task", ["seq2seq", "regression", "autoregressive"])
def test_full_experts_train_alike_on_every_layout_and_go_on_bit_for_bit(tmp_path: Path, task: str) -> None:
    (pairs.write_pairs if task == "seq2seq" else values.write_rows)(tmp_path)
    half = (pairs.runs_in(tmp_path) if task == "seq2seq" else values.RUNS).half_of(tmp_path, f"{task} {RESUMED}")
    perform(tmp_path, [item(tmp_path, task, "one process")], nproc=1)
    runs = [item(tmp_path, task, name, **LAYOUTS[2][name]) for name in NAMES]
    perform(tmp_path, [*runs, item(tmp_path, task, "again", **LAYOUTS[2][RESUMED], checkpoint=half)], 2, timeout=900)
    alone = metrics(tmp_path / f"{task} one process")
    overflowed = [row[key] for row in alone for key in row if "overflow" in key]
    assert overflowed and max(overflowed) > 0.01, "no expert was full"
    for name in NAMES:
        rows = metrics(tmp_path / f"{task} {name}")
        assert len(rows) == len(alone)
        for row, right in zip(rows, alone, strict=True):
            keys = [key for key in right if key in ("loss", "grad_norm", "targets") or key.startswith("valid_")]
            # float32 sums in another order
            expected = pytest.approx({key: right[key] for key in keys}, rel=1e-5)
            assert {key: row[key] for key in keys} == expected, (name, row["step"])
    again, whole = (without_timing(metrics(tmp_path / f"{task} {name}")) for name in ("again", RESUMED))
    assert again and again == whole[-len(again) :]
