"""A rank that fails ends its job soon, is named with its reason in the last lines, and leaves no process behind."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.failure_job import FAULTS, PLACES
from tests.distributed.harness import ROOT, environment

pytestmark = pytest.mark.distributed

JOB = "tests/distributed/failure_job.py"
RANKS = 3
PROMISED_S = 60  # from the fault on; of a silent one, from when its peers' patience is over
PATIENCE_S = 8
START_S = 30  # of three processes that import torch and DeepSpeed at once on a busy machine
REASONS = {
    "raise": "the disk is on fire",
    "user": "the disk is on fire",
    "_exit": "status 3",
    "exit": "status 4",
    "kill": "SIGKILL",
    "segfault": "SIGSEGV",
}
STAGE = "stage 2 of 3"  # of rank 1
SILENT = {"stop": "stopped", "exit0": "gone"}  # torchrun sees no failure, until the others tire of waiting
CAMPAIGN = [(fault, place, launcher) for fault in FAULTS for place in PLACES for launcher in ("own", "torchrun")]
FEW = [
    ("kill", "collective", "own"),
    ("raise", "subgroup", "torchrun"),
    ("stop", "pipeline", "own"),
]


def last_words(fault: str, place: str, launcher: str, folder: Path) -> str:
    """What the job says last, after everything that any promise says of its end has been checked."""
    rank = rank_of(place)
    words = [str(ROOT / JOB), fault, place, str(rank), str(PATIENCE_S), f"--mark={folder}"]
    if launcher == "own":
        words = [sys.executable, *words, "--nproc", str(RANKS)]
    else:
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS}", *words]
    # native code that loses a peer may print bytes that are no text
    process = subprocess.Popen(
        words, env=environment(), cwd=ROOT, stderr=subprocess.PIPE, encoding="utf-8", errors="replace"
    )
    try:
        _, stderr = process.communicate(timeout=START_S + PROMISED_S + (PATIENCE_S if fault in SILENT else 0))
    finally:
        process.kill()
        left = processes_of(folder)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
    assert not left
    assert process.returncode != 0, stderr
    # native code of a rank that lost a peer logs one or two lines, and nothing can hold it back
    return stderr.rpartition("Root Cause")[2] if launcher == "torchrun" else "\n".join(stderr.splitlines()[-5:])


def rank_of(place: str) -> int:
    """Rank 0 where the others wait for what it decides."""
    return 0 if place == "decision" else 1


def processes_of(folder: Path) -> list[int]:
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if f"--mark={folder}" in Path(f"/proc/{pid}/cmdline").read_text().split("\0"):
                found.append(int(pid))
        except OSError:  # it has just ended
            continue
    return found


def check(fault: str, place: str, launcher: str, folder: Path) -> None:
    words, rank = last_words(fault, place, launcher, folder), rank_of(place)
    if fault in SILENT:  # the others say it: before it came, nothing is known of its process
        came = place not in ("import", "before_start")
        what = rf"{STAGE}, process \d+" if place == "pipeline" else r"process \d+"
        expected = rf"rank {rank} \({what}\) is {SILENT[fault]}" if came else rf"rank {rank} did not come within"
        assert re.search(expected, words), words
        return
    if place == "pipeline" and fault in ("raise", "user", "exit"):
        assert f"rank {rank} ({STAGE})" in words or f"(rank {rank} ({STAGE}))" in words, words
    if launcher == "torchrun":
        assert f"rank      : {rank} " in words, words
    elif not (fault == "user" and rank == 0):  # rank 0 speaks for all
        assert f"rank {rank}" in words, words
    if place == "import" and fault in ("raise", "user"):  # before anything of ours runs: Python's own traceback
        assert "status 1" in words or "exitcode  : 1 " in words, words
    elif launcher == "torchrun" and fault in ("_exit", "exit"):
        assert re.search(rf"{REASONS[fault]}|exitcode  : {REASONS[fault][-1]} ", words), words
    else:
        assert REASONS[fault] in words, words


@pytest.mark.parametrize(("fault", "place", "launcher"), FEW)
def test_a_failing_rank_ends_the_job_and_is_named(fault: str, place: str, launcher: str, tmp_path: Path) -> None:
    check(fault, place, launcher, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize(("fault", "place", "launcher"), [case for case in CAMPAIGN if case not in FEW])
def test_every_fault_at_every_place(fault: str, place: str, launcher: str, tmp_path: Path) -> None:
    check(fault, place, launcher, tmp_path)
