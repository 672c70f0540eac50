"""Ten SIGTERMs at odd moments of one run: nothing is lost, and the run ends as if nobody had sent them."""

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

pytestmark = [pytest.mark.distributed, pytest.mark.full]

STEPS = 60
VALIDATE = 6
SECONDS = 30  # torchrun kills its ranks this long after its own SIGTERM
MOMENTS = (
    "start", "compile", "save", "validation", "start", "step", "validation", "save", "compile", "step"
)  # fmt: skip


def moment_has_come(moment: str, process: subprocess.Popen[str], run_dir: Path, begun: int) -> bool:
    """Whether the run, relaunched when its last recorded step was `begun`, is in the middle of `moment`."""
    rows = metrics(run_dir)
    last = rows[-1]["step"] if rows else 0
    if moment == "start":
        return bool(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
    if moment == "compile":  # the log is open, the first step is not made
        log = run_dir / "log.txt"
        return log.exists() and time.time() - log.stat().st_mtime < 60 and last == begun and opened_since(process, log)
    if moment == "save":
        return any((run_dir / "checkpoints").glob(".*step_*"))
    if moment == "validation":
        return last > begun and last % VALIDATE == VALIDATE - 1
    return last >= begun + 2


def opened_since(process: subprocess.Popen[str], log: Path) -> bool:
    started = Path(f"/proc/{process.pid}").stat().st_ctime
    return log.stat().st_mtime > started


def test_ten_sigterms_lose_nothing(tmp_path: Path) -> None:
    write_text(tmp_path, documents=2000)
    config = write_config(
        tmp_path / "config.yaml",
        tiny_config(
            tmp_path,
            train={"steps": STEPS, "compile": True, "micro_batch_size": 8},
            checkpoint={"interval": 4},
            eval={"interval": VALIDATE},
        ),
    )
    arguments = ["--config", str(config)]
    whole = run("launch/pretrain.py", *arguments, "--run_dir", str(tmp_path / "whole"), nproc=2, timeout=600)
    assert whole.returncode == 0, whole.stderr

    run_dir = tmp_path / "stopped"
    table = []
    for moment in MOMENTS:
        begun = max([row["step"] for row in metrics(run_dir)], default=0)
        process = subprocess.Popen(
            command("launch/pretrain.py", *arguments, "--run_dir", str(run_dir), nproc=2),
            env=environment(),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        while not moment_has_come(moment, process, run_dir, begun):
            assert process.poll() is None, f"{moment} never came: {process.stdout and process.stdout.read()[-2000:]}"
            time.sleep(0.002)
        if moment == "start":
            # in imports, or in building. Not at once: torchrun's signal is lost on a rank that is between fork and exec
            time.sleep(0.5 + len(table) % 3)
        sent = time.monotonic()
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
        took = time.monotonic() - sent
        reached = max([row["step"] for row in metrics(run_dir)], default=0)
        saved = max((int(p.name[5:]) for p in (run_dir / "checkpoints").glob("step_*")), default=0)
        table.append((moment, begun, reached, saved, round(took, 1)))
        assert process.returncode != 0 and took < SECONDS, (table, output)
        assert saved == reached, (table, output)
        assert not [pid for pid in os.listdir("/proc") if pid.isdigit() and str(run_dir) in command_line(pid)], table
    done = run("launch/pretrain.py", *arguments, "--run_dir", str(run_dir), nproc=2, timeout=600)
    assert done.returncode == 0, done.stderr
    print(*table, sep="\n")

    def trained(folder: Path) -> list[dict[str, object]]:  # a validation that a stop cut short is not made up for
        rows = without_timing(metrics(folder))
        return [{key: value for key, value in row.items() if not key.startswith("valid_")} for row in rows]

    assert trained(run_dir) == trained(tmp_path / "whole")
    last = f"checkpoints/step_{STEPS:08d}/rank_00000.safetensors"
    assert (run_dir / last).read_bytes() == (tmp_path / "whole" / last).read_bytes()


def command_line(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""
