"""A run that is killed again and again, and relaunched by the same command, is bitwise the run that nobody touched."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.distributed.harness import (
    ROOT,
    command,
    environment,
    metrics,
    run,
    tiny_config,
    without_timing,
    write_config,
    write_text,
)
from tests.machine import needs

pytestmark = [pytest.mark.distributed, pytest.mark.full]  # test_campaign.py has a short form for every day

INTERVAL = 5
STEPS = 80
KILL_AFTER = (3, 13, 21, 38, 54, 66)  # steps; none on a checkpoint, so that each relaunch has steps to repeat


def workers_of(launcher: int) -> list[int]:
    """Process ids of the ranks below a torchrun."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [int(child) for child in children]


def kill_one_rank_after(step: int, arguments: list[str], run_dir: Path, rank: int) -> int:
    """Launch, SIGKILL one rank once `step` is in metrics.jsonl, wait for the end; the last step it had recorded."""
    launcher = subprocess.Popen(
        command("launch/pretrain.py", *arguments, nproc=2),
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (rows := metrics(run_dir)) or rows[-1]["step"] < step:
        assert launcher.poll() is None, "the run ended before the kill"
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.01)
    os.kill(workers_of(launcher.pid)[rank], signal.SIGKILL)
    assert launcher.wait(timeout=60) != 0
    return int(metrics(run_dir)[-1]["step"])


@pytest.mark.parametrize(
    ("precision", "kills"),
    [("fp32", KILL_AFTER), ("bf16", KILL_AFTER)],
    ids=["fp32, six kills", "bf16, six kills"],
)
def test_a_killed_run_is_bitwise_the_uninterrupted_one(tmp_path: Path, precision: str, kills: tuple[int, ...]) -> None:
    needs(precision)
    write_text(tmp_path)
    config = write_config(
        tmp_path / "config.yaml",
        tiny_config(
            tmp_path,
            train={"steps": STEPS, "precision": precision},
            checkpoint={"interval": INTERVAL, "keep_best": True},
            eval={"interval": 10},
        ),
    )
    base = ["--config", str(config)]
    reference = run("launch/pretrain.py", *base, "--run_dir", str(tmp_path / "whole"), nproc=2)
    assert reference.returncode == 0, reference.stderr

    victim = tmp_path / "killed"
    arguments = [*base, "--run_dir", str(victim)]
    replayed = 0
    for i, step in enumerate(kills):
        reached = kill_one_rank_after(step, arguments, victim, rank=i % 2)
        committed = max((int(p.name[5:]) for p in (victim / "checkpoints").glob("step_*")), default=0)
        # a save goes on behind the training, but never two, so the one before the last is always there
        assert committed >= reached - 2 * INTERVAL - 1, "more than two intervals were lost"
        replayed += reached - committed
    done = run("launch/pretrain.py", *arguments, nproc=2)
    assert done.returncode == 0, done.stderr
    assert f"resumed from {victim}/checkpoints/step_" in done.stdout
    assert replayed > 0, "no step was repeated, so nothing was shown"

    assert without_timing(metrics(victim)) == without_timing(metrics(tmp_path / "whole"))
    last = f"checkpoints/step_{STEPS:08d}"
    for name in ("rank_00000.safetensors", "rank_00001.safetensors"):
        assert (victim / last / name).read_bytes() == (tmp_path / "whole" / last / name).read_bytes()
    assert not list((victim / "checkpoints").glob(".*")), "a killed save left something behind"
