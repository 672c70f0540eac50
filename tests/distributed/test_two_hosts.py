"""Two machines with addresses and a network of their own, as Linux network namespaces: a run by launch/node.sh, one
machine cut off, and the run again.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.harness import (
    ROOT,
    environment,
    metrics,
    tiny_config,
    without_timing,
    write_config,
    write_text,
)

TIMEOUT_S = 15
HOSTS = {"lattice-a": "10.77.0.1", "lattice-b": "10.77.0.2"}


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def _remove() -> None:
    for name in HOSTS:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
        shutil.rmtree(f"/etc/netns/{name}", ignore_errors=True)


def why_not() -> str | None:
    """Why this machine cannot make network namespaces; None where it can."""
    if os.name != "posix" or os.geteuid() != 0:
        return "needs root, to make network namespaces"
    if not shutil.which("ip") or not shutil.which("unshare"):
        return "needs ip (iproute2) and unshare (util-linux)"
    made = subprocess.run(["ip", "netns", "add", "lattice-try"], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", "lattice-try"], capture_output=True)
    return f"no network namespaces here: {made.stderr.strip()}" if made.returncode else None


pytestmark = [pytest.mark.distributed, pytest.mark.full]  # most of it is waiting for time-outs


@pytest.fixture
def hosts() -> Iterator[None]:
    """Two namespaces, joined by a cable; each knows both names."""
    if reason := why_not():
        pytest.skip(reason)
    _remove()
    try:
        _ip("link", "add", "lattice-a0", "type", "veth", "peer", "name", "lattice-b0")
        for name, address in HOSTS.items():
            _ip("netns", "add", name)
            _ip("link", "set", f"{name}0", "netns", name)
            _ip("-n", name, "address", "add", f"{address}/24", "dev", f"{name}0")
            for device in ("lo", f"{name}0"):
                _ip("-n", name, "link", "set", device, "up")
            names = Path("/etc/netns") / name / "hosts"  # what `ip netns exec` shows as /etc/hosts there
            names.parent.mkdir(parents=True)
            names.write_text("127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for n, a in HOSTS.items()))
        yield
    finally:
        _remove()


def start(name: str, run_dir: Path, config: Path, job: str, *flags: str) -> subprocess.Popen[str]:
    """launch/node.sh on one host, with output to files beside the run folder."""
    settings = {"HEAD": "lattice-a", "NODES": "2", "RANKS": "2", "JOB": job, "RESTARTS": "0", "JOIN_S": "60"}
    words = ["bash", str(ROOT / "launch/node.sh"), str(ROOT / "launch/pretrain.py"), "--config", str(config)]
    words += ["--run_dir", str(run_dir), *flags]
    shell = f'hostname {name} && exec "$@"'
    path = run_dir.parent / f"{job}-{name}.txt"
    with path.open("w") as output:
        return subprocess.Popen(
            ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", shell, "sh", *words],
            env={**environment(), **settings},
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def end(process: subprocess.Popen[str], seconds: float) -> int:
    try:
        return process.wait(seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.usefixtures("hosts")
def test_a_host_that_is_cut_off_ends_the_job_and_the_same_command_goes_on(tmp_path: Path) -> None:
    write_text(tmp_path)
    sections = {
        "parallel": {"timeout_s": TIMEOUT_S, "pipeline": 2},  # ranks 0 and 1 on the one host, 2 and 3 on the other
        "train": {"steps": 1000, "micro_batch_size": 2},
        "optim": {"schedule": "constant"},
        "checkpoint": {"interval": 5, "keep": 2},
    }
    config, run_dir = write_config(tmp_path / "config.yaml", tiny_config(tmp_path, **sections)), tmp_path / "run"
    first = {name: start(name, run_dir, config, "first") for name in HOSTS}
    try:
        deadline = time.monotonic() + 90
        while len(metrics(run_dir)) < 12:
            assert time.monotonic() < deadline and first["lattice-a"].poll() is None, _said(tmp_path, "first")
            time.sleep(0.1)
        _ip("-n", "lattice-b", "link", "set", "lattice-b0", "down")
        time.sleep(1)
        os.killpg(first["lattice-b"].pid, signal.SIGKILL)
        # the time-out, the wait for reasons (GRACE_S, and 5 s where the store is slow), and torchrun's own end
        assert end(first["lattice-a"], TIMEOUT_S + 40) != 0
    finally:
        for process in first.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    said = (tmp_path / "first-lattice-a.txt").read_text()
    assert "ranks 2, 3 (lattice-b) did not meet this failure" in said, said

    _ip("-n", "lattice-b", "link", "set", "lattice-b0", "up")
    saved = max(int(path.name[-8:]) for path in (run_dir / "checkpoints").glob("step_*"))
    steps = saved + 6
    done = metrics(run_dir)
    again = {name: start(name, run_dir, config, "second", f"--train.steps={steps}") for name in HOSTS}
    assert [end(process, 90) for process in again.values()] == [0, 0], _said(tmp_path, "second")
    rows = metrics(run_dir)
    assert [row["step"] for row in rows][-1] == steps and f"step {saved}," in _said(tmp_path, "second")
    both = {row["step"]: row for row in without_timing(done)}
    for row in without_timing(rows):
        if row["step"] in both and row["step"] > saved:
            assert row == both[row["step"]], "the steps that were lost are made again, bit by bit"


def _said(folder: Path, job: str) -> str:
    return "\n".join(f"{name}:\n{(folder / f'{job}-{name}.txt').read_text()[-3000:]}" for name in HOSTS)
