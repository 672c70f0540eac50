"""A forward knows all that it needs: others of the same model may come before its backward."""

import json
from pathlib import Path

import pytest

from tests.distributed.pool import run_job

pytestmark = pytest.mark.distributed


def test_forwards_of_other_lengths_may_come_between_a_forward_and_its_backward(tmp_path: Path) -> None:
    """Two ranks with sequence parallelism, all recomputed in the backward: which cuts tokens as the forward did."""
    done = run_job("tests/distributed/contexts_job.py", str(tmp_path / "out.json"), nproc=2)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["parameters"] > 40
    assert found["largest_difference"] < 1e-6  # float32 sums of two gradients in another order
