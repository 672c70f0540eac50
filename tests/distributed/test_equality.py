"""One answer on 1, 2 and 4 processes and with 1, 2 and 4 micro-batches per step."""

from pathlib import Path

import pytest

from tests.distributed.equality_job import CASES
from tests.distributed.harness import metrics, tiny_config, write_config, write_text
from tests.distributed.pool import run_job

pytestmark = pytest.mark.distributed

STEPS = 20
# float32 sums in another order differ by about 1e-7 relative; 20 steps of training may amplify that, but not a
# hundredfold. A wrong gradient scale is off by a factor of at least 1.5.
RELATIVE = 1e-5


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("equality")
    write_text(folder)
    config = write_config(folder / "config.yaml", tiny_config(folder, train={"steps": STEPS}))
    for nproc in (1, 2, 4):
        done = run_job("tests/distributed/equality_job.py", str(config), str(folder / "runs"), nproc=nproc)
        assert done.returncode == 0, done.stderr
    return folder / "runs"


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(("optimizer", "accumulation"), CASES)
def test_losses_norms_and_routing_do_not_depend_on_the_layout(
    runs: Path, optimizer: str, accumulation: int, ranks: int
) -> None:
    reference = metrics(runs / f"{optimizer}-1x1")
    rows = metrics(runs / f"{optimizer}-{ranks}x{accumulation}")
    assert len(rows) == len(reference) == STEPS
    for row, expected in zip(rows, reference, strict=True):
        for key in ("loss", "lm_loss", "moe_balance_loss", "moe_z_loss", "grad_norm"):
            assert row[key] == pytest.approx(expected[key], rel=RELATIVE), (row["step"], key)
        assert row["routing_checksum"] == expected["routing_checksum"], row["step"]
        assert row["targets"] == expected["targets"]


def test_the_reference_run_learns_and_clips(runs: Path) -> None:
    rows = metrics(runs / "adamw-1x1")
    assert rows[-1]["lm_loss"] < rows[0]["lm_loss"] - 0.3
    assert all(row["grad_norm"] > 0.5 for row in rows[:5]), "clipping at 0.5 must bite, or its scale is not tested"
