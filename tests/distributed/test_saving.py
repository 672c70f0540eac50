"""Checkpoints written behind the training are those written before it; a full disk stops a run, or does not, as it is
reported; and a run folder takes one job."""

import signal
import subprocess
from pathlib import Path

import pytest

from llm.checkpoint.lock import LOCK_FILE
from llm.checkpoint.reader import Checkpoint
from tests.distributed.harness import metrics, run, tiny_config, without_timing, write_config, write_text
from tests.distributed.saving_job import FULL, INTERVAL, STEPS
from tests.distributed.test_requests import started

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("saving")
    write_text(folder, documents=80)
    config = write_config(folder / "c.yaml", tiny_config(folder, train={"steps": STEPS}))
    return folder, run("tests/distributed/saving_job.py", str(config), str(folder), nproc=2)


def saved(run_dir: Path) -> list[int]:
    """Steps of the checkpoints, each of which is whole, and beside which nothing is left."""
    found = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    for name in found:
        checkpoint = Checkpoint.open(run_dir / "checkpoints" / name)
        for parameter, kinds in checkpoint.kinds().items():
            for kind in kinds:
                checkpoint.read(parameter, kind)
    return [int(name.removeprefix("step_")) for name in found]


EVERY = [*range(INTERVAL, STEPS, INTERVAL), STEPS]


def test_behind_the_training_the_same_is_written_as_before_it(job: tuple[Path, object]) -> None:
    folder, _ = job
    assert saved(folder / "behind") == saved(folder / "blocking") == EVERY
    for step in EVERY:
        for rank in range(2):
            file = f"checkpoints/step_{step:08d}/rank_{rank:05d}.safetensors"
            assert (folder / "behind" / file).read_bytes() == (folder / "blocking" / file).read_bytes()


@pytest.mark.parametrize("name", ["blocking-full", "behind-full"])
def test_a_full_disk_need_not_stop_the_training(job: tuple[Path, object], name: str) -> None:
    folder, _ = job
    lost = [step for step in EVERY if FULL[0] <= step < FULL[1]]
    kept = [step for step in EVERY if step not in lost]
    # one written behind the training in step 4 may find the disk full too
    assert saved(folder / name) in ([kept] if name == "blocking-full" else [kept, [s for s in kept if s != 4]])
    assert without_timing(metrics(folder / name)) == without_timing(metrics(folder / "blocking"))
    reported = [line for line in (folder / name / "log.txt").read_text().splitlines() if "no checkpoint" in line]
    assert len(reported) == len(EVERY) - len(saved(folder / name))
    for line in reported:
        assert "checkpoint.on_failure=continue" in line and "rank_00001.safetensors: File too large" in line


def test_a_full_disk_stops_the_training_by_default(job: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = job
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "rank_00001.safetensors: File too large (rank 1)" in lines[0], done.stderr
    run_dir = folder / "stopped-full"
    assert saved(run_dir) in ([2], [2, 4])
    assert metrics(run_dir)[-1]["step"] < STEPS
    assert not (run_dir / LOCK_FILE).exists()


def test_a_second_job_in_a_run_folder_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    process = started(tmp_path, nproc=None)
    again = ["--config", str(tmp_path / "config.yaml"), "--run_dir", str(tmp_path / "run")]
    second = run("launch/pretrain.py", *again)
    assert second.returncode == 2
    (line,) = second.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path / 'run'}: in use by process {process.pid} on "), line
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert (tmp_path / "run" / LOCK_FILE).exists(), "what a kill leaves"
    reached = metrics(tmp_path / "run")[-1]["step"]
    third = run("launch/pretrain.py", *again, "--train.steps=3")
    assert third.returncode == 0, third.stderr
    assert reached >= 3 and [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3]
    assert not (tmp_path / "run" / LOCK_FILE).exists()
