"""Stopping and saving on request lose no step."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from llm.signals import EXIT_STOPPED
from llm.train.stop import SAVE_FILE
from tests.distributed.harness import ROOT, command, environment, metrics, tiny_config, write_config, write_text

pytestmark = pytest.mark.distributed


def started(folder: Path, *flags: str, nproc: int | None) -> subprocess.Popen[str]:
    """A run that would take far longer than the test, at its third step or later."""
    write_text(folder)
    config = write_config(
        folder / "config.yaml",
        tiny_config(
            folder, train={"steps": 100_000}, checkpoint={"interval": 100_000}, optim={"warmup_steps": 2}
        ),
    )
    process = subprocess.Popen(
        command("launch/pretrain.py", "--config", str(config), "--run_dir", str(folder / "run"), *flags, nproc=nproc),
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for(lambda: len(metrics(folder / "run")) >= 3, process)
    return process


def wait_for(condition: object, process: subprocess.Popen[str]) -> None:
    assert callable(condition)
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, (
            "the run ended, or what was waited for never came"
        )
        time.sleep(0.02)


def saved_steps(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / "run" / "checkpoints").glob("step_*"))


def test_sigterm_to_torchrun_saves_the_step_it_finds(tmp_path: Path) -> None:
    process = started(tmp_path, nproc=2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=600)
    assert process.returncode != 0  # torchrun's own status for a signal
    last = metrics(tmp_path / "run")[-1]["step"]
    assert saved_steps(tmp_path) == [last], output
    assert f"stopped on request after step {last}" in output


def test_one_signalled_rank_stops_all_and_says_so_by_its_status(tmp_path: Path) -> None:
    process = started(tmp_path, "--nproc=2", nproc=None)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGTERM)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == EXIT_STOPPED, output
    assert saved_steps(tmp_path) == [metrics(tmp_path / "run")[-1]["step"]]


def test_a_terminal_that_closes_stops_a_run_that_saves_first(tmp_path: Path) -> None:
    """The launcher gets SIGHUP, and who is impatient sends more; neither screen nor log.txt can be written."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.txt").symlink_to("/dev/full")
    process = started(tmp_path, "--nproc=2", nproc=None)
    assert process.stdout is not None
    process.stdout.close()
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        process.send_signal(number)
    assert process.wait(timeout=600) == EXIT_STOPPED
    assert saved_steps(tmp_path) == [metrics(tmp_path / "run")[-1]["step"]]


def test_a_touched_file_saves_and_the_run_goes_on(tmp_path: Path) -> None:
    process = started(tmp_path, nproc=None)
    request = tmp_path / "run" / SAVE_FILE
    request.touch()
    wait_for(lambda: not request.exists(), process)
    (step,) = saved_steps(tmp_path)
    wait_for(lambda: metrics(tmp_path / "run")[-1]["step"] > step + 2, process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == EXIT_STOPPED, output
    assert saved_steps(tmp_path)[-1] == metrics(tmp_path / "run")[-1]["step"]
