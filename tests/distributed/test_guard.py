"""A loss or gradient that is not finite on one rank never reaches the weights of any, whatever the policy."""

import json
from pathlib import Path

import pytest

from tests.distributed.guard_job import BAD_STEP, CASES, DUALPIPEV, PIPELINE, SPOILED, STAGES
from tests.distributed.harness import metrics, tiny_config, write_config, write_text
from tests.distributed.pool import run_job
from tests.machine import needs

pytestmark = pytest.mark.distributed

STEPS = 13
GO_ON = [name for name in CASES if name not in ("skipped", "loss-raise")]


IN_FULL = (1, 3, PIPELINE, DUALPIPEV)


@pytest.fixture(scope="module", params=[pytest.param(s, marks=[pytest.mark.full] * (s in IN_FULL)) for s in STAGES])
def stage(request: pytest.FixtureRequest) -> int:
    """Of ZeRO, or that of a pipeline."""
    needs(STAGES[request.param])
    return int(request.param)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, stage: int) -> Path:
    folder = tmp_path_factory.mktemp("guard")
    write_text(folder)
    config = tiny_config(
        folder,
        train={"steps": STEPS, "micro_batch_size": 4},  # two micro-batches a rank
        checkpoint={"interval": 4},
        optim={"ema_decay": 0.9, "warmup_steps": 2},
    )
    words = [str(write_config(folder / "c.yaml", config)), str(folder), str(stage)]
    done = run_job("tests/distributed/guard_job.py", *words, nproc=2)
    assert done.returncode == 0, done.stderr
    return folder


def files(run_dir: Path) -> dict[str, bytes]:
    """What the last checkpoint holds, less the manifest with its notes."""
    folder = run_dir / "checkpoints" / f"step_{STEPS:08d}"
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix == ".safetensors"}


@pytest.mark.parametrize("name", GO_ON)
def test_the_run_is_bitwise_one_that_passed_over_the_step(runs: Path, stage: int, name: str) -> None:
    found, expected = files(runs / f"{stage}-{name}"), files(runs / f"{stage}-skipped")
    assert found == expected and expected


def test_it_is_logged_with_step_rank_and_rows(runs: Path, stage: int) -> None:
    log = (runs / f"{stage}-loss-skip" / "log.txt").read_text()
    # rank 1's second micro-batch of four rows: rows 12 to 15 of the step's sixteen
    first = (BAD_STEP - 1) * 16 + 12
    last, before = {
        PIPELINE: ("rank 1 (stage 2 of 2)", "rank 0 (stage 1 of 2)"),
        DUALPIPEV: ("rank 0 (stage 4 of 4)", "rank 1 (stage 3 of 4)"),
    }.get(stage, ("rank 1", None))
    assert f"step {BAD_STEP}: the loss is nan ({last}: loss of rows {first} to {first + 3} is nan); no update" in log
    log = (runs / f"{stage}-gradient-skip" / "log.txt").read_text()
    # in a pipeline what goes wrong is a gradient that is sent to the stage before
    who, spans = (last, first - 8) if before is None else (before, first - 12)
    assert f"step {BAD_STEP}: the gradient is not finite ({who}: a gradient of rows {spans} to" in log
    log = (runs / f"{stage}-loss-rewind" / "log.txt").read_text()
    assert "going back to the last checkpoint" in log and f"step {BAD_STEP}: passed over" in log


def test_rows_of_metrics_say_what_was_not_applied(runs: Path, stage: int) -> None:
    for name, reason in (("loss-skip", "loss"), ("gradient-skip", "gradient"), ("spike-skip", "limit")):
        rows = metrics(runs / f"{stage}-{name}")
        assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
        assert [row["skipped"] for row in rows] == [None] * (BAD_STEP - 1) + [reason] + [None] * (STEPS - BAD_STEP)
        assert rows[BAD_STEP - 1]["grad_norm"] is None
    rows = metrics(runs / f"{stage}-loss-rewind")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[BAD_STEP - 1]["skipped"] == "passed over"


def test_raise_stops_all_ranks_with_finite_weights(runs: Path, stage: int) -> None:
    for rank in (0, 1):
        text = (runs / f"{stage}-loss-raise" / f"error{rank}.txt").read_text()
        assert text.startswith(f"True step {BAD_STEP}: the loss is nan (rank {SPOILED.get(stage, 1)}")
    log = (runs / f"{stage}-loss-raise" / "log.txt").read_text()
    assert log.count(f"\nerror: step {BAD_STEP}: the loss is nan") == 1
    steps = sorted(path.name for path in (runs / f"{stage}-loss-raise" / "checkpoints").iterdir())
    assert steps == ["step_00000004", "step_00000008"]


def test_the_guards_memory_is_in_the_checkpoint(runs: Path, stage: int) -> None:
    folder = runs / f"{stage}-loss-rewind" / "checkpoints" / f"step_{STEPS:08d}"
    manifest = next(file for file in folder.iterdir() if file.suffix == ".json")
    guard = json.loads(manifest.read_text())["meta"]["guard"]
    rows = [[(BAD_STEP - 1) * 16, BAD_STEP * 16]]
    assert guard["rows_passed_over"] == rows and guard["events"] == 1 and len(guard["losses"]) == STEPS - 1
