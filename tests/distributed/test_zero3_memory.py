"""No rank ever holds the whole model under ZeRO-3, not even while it is made."""

import json
from pathlib import Path

import pytest

from tests.distributed.harness import run
from tests.machine import needs

pytestmark = [pytest.mark.distributed, pytest.mark.full]

RANKS = 8
STATE = 2 + 4 + 4 + 8  # bytes per parameter: bf16 weight, float32 gradient and master, AdamW's two moments


def test_a_model_four_times_a_ranks_share_of_memory_is_made_within_that_share(tmp_path: Path) -> None:
    needs("bf16")
    done = run("tests/distributed/zero3_memory_job.py", str(tmp_path / "out.json"), nproc=RANKS, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out.json").read_text())
    n_parameters = rows[0][2]
    assert sum(owned for _, owned, _ in rows) == n_parameters
    print(f"state {STATE * n_parameters >> 20} MiB, peaks {[grown >> 20 for grown, _, _ in rows]} MiB")
    for grown, _, _ in rows:
        assert grown < STATE * n_parameters / 4
        assert grown < (2 + 4) * n_parameters / 2, "weights and masters of the whole model, halved"
