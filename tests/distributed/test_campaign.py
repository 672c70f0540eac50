"""tools/campaign.py: a run under SIGKILLs is bitwise the run that nobody touched; the campaign covers every place and
rank, and finds what is not as it should be. And no rank outlives the torchrun that started it.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llm.errors import UserError
from llm.train.config import RunConfig, validate
from tests.distributed.harness import ROOT, environment, tiny_config, write_config, write_text
from tools.campaign import comparable, differing_files, main, parted, unsound
from tools.campaign_job import FIRST, MARK, processes
from tools.campaign_plan import PLACES, Settings, plan

pytestmark = pytest.mark.distributed

KILLS = 2
FULL = {
    "tensor 2 x data 2": (4, {"tensor": 2}, {"keep": 2, "keep_best": True}),
    "ZeRO-3": (2, {"zero_stage": 3}, {"keep": 2}),
}


def campaign(folder: Path, *words: str, timeout: float) -> str:
    """What a campaign reports, which has to end well."""
    out = folder / "table.txt"
    arguments = ["--config", str(folder / "config.yaml"), "--out", str(out), *words]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/campaign.py"), *arguments],
        env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == out.read_text()
    assert done.stdout.count("  equal\n") == int(words[words.index("--kills") + 1])
    return done.stdout


def steps_made_again(report: str) -> int:
    found = re.search(r"(\d+) made again and compared", report)
    assert found is not None, report
    return int(found[1])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both runs of a short campaign on two tensor-parallel ranks, brought back by torchrun --max-restarts."""
    folder = tmp_path_factory.mktemp("campaign")
    write_text(folder, documents=100)
    config = tiny_config(folder, parallel={"tensor": 2}, checkpoint={"keep": 9})
    write_config(folder / "config.yaml", config)
    words = ["--nproc", "2", "--kills", str(KILLS), "--restarts", "torchrun", "--keep_dir", str(folder / "runs")]
    report = campaign(folder, *words, "--data.valid=null", timeout=600)
    assert steps_made_again(report) >= 2 * KILLS, report
    return folder / "runs"


def test_a_short_campaign_ends_with_the_same_bits(runs: Path) -> None:
    assert not list(differing_files(runs / "untouched", runs / "killed"))
    assert comparable(runs / "killed") == comparable(runs / "untouched")
    assert not processes(runs)


@pytest.mark.parametrize("fault", ["row", "gap", "block", "half", "left over", "missing"])
def test_the_campaign_sees_what_is_wrong(runs: Path, tmp_path: Path, fault: str) -> None:
    run = tmp_path / "killed"
    shutil.copytree(runs / "killed", run)
    expected = comparable(runs / "untouched")
    rows, checkpoint = run / "metrics.jsonl", sorted((run / "checkpoints").iterdir())[1]
    if fault == "row":  # the last bit of one loss
        lines = rows.read_text().splitlines()
        lines[6] = re.sub(r'("loss": [\d.]+)\d,', r"\g<1>,", lines[6], count=1)
        rows.write_text("\n".join(lines) + "\n")
        assert list(parted(comparable(run), expected)) == [
            f"step 7 differs from the untouched run's (1 of {len(lines)} steps do)"
        ]
    elif fault == "gap":
        lines = rows.read_text().splitlines()
        rows.write_text("\n".join(lines[:3] + lines[4:]) + "\n")
        assert list(parted(comparable(run), expected)) == ["metrics.jsonl misses or repeats a step"]
    elif fault == "block":
        file = checkpoint / "rank_00001.safetensors"
        data = bytearray(file.read_bytes())
        data[-5] ^= 1
        file.write_bytes(data)
        assert [checkpoint.name in text for text in unsound(run)] == [True]
        assert list(differing_files(runs / "untouched", run)) == [f"differs: {file.relative_to(run)}"]
    elif fault == "half":
        (checkpoint / "rank_00001.safetensors").unlink()
        assert [checkpoint.name in text for text in unsound(run)] == [True]
    elif fault == "left over":
        (run / "checkpoints/.unfinished-step_00000010").mkdir()
        (run / "lock").touch()
        lines = ["left over: checkpoints/.unfinished-step_00000010", "left over: lock"]
        assert list(differing_files(runs / "untouched", run)) == lines
    else:
        (run / "config.yaml").unlink()
        assert list(differing_files(runs / "untouched", run)) == ["missing: config.yaml"]


def tiny(**sections: dict[str, Any]) -> RunConfig:
    return validate(tiny_config(Path("text"), **sections), "test")


@pytest.mark.parametrize("restarts", ["torchrun", "command", "both"])
@pytest.mark.parametrize("seed", range(5))
def test_the_plan_covers_every_place_and_rank_in_the_order_of_the_run(restarts: Any, seed: int) -> None:
    settings = Settings("c", nproc=4, kills=30, restarts=restarts, seed=seed)
    kills = plan(settings, tiny())
    assert kills == plan(settings, tiny()) and len(kills) == 30
    assert {kill.place for kill in kills} == set(PLACES)
    assert {kill.rank for kill in kills if not PLACES[kill.place].main_only} == set(range(4))
    assert all(kill.rank == 0 for kill in kills if PLACES[kill.place].main_only)
    assert {kill.restart for kill in kills} == ({"torchrun", "command"} if restarts == "both" else {restarts})
    expected = {"rank"} if restarts == "torchrun" else {"rank", "all", "launcher"}
    assert {kill.who for kill in kills} == expected
    assert all(kill.who == "rank" for kill in kills if kill.restart == "torchrun"), "a dead torchrun restarts nothing"
    # every kill must come while the run still goes, and find a checkpoint where it needs one
    assert max(kill.step for kill in kills) <= settings.length() - settings.interval
    first_load = [kill.place for kill in kills].index("load")
    assert max(kill.step for kill in kills[:first_load]) > settings.interval


def test_a_place_that_a_config_never_reaches_is_left_out() -> None:
    settings = Settings("c", nproc=2, kills=30, interval=5)
    for checkpoint in ({"interval": 5, "keep_every": 5}, {"keep": 50}):
        kills = plan(settings, tiny(checkpoint=checkpoint))
        assert len(kills) == 30 and {kill.place for kill in kills} == set(PLACES) - {"pruning"}


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--kills", "0"], "--kills=0"),
        (["--nproc", "0"], "--nproc=0"),
        (["--interval", "0"], "--interval=0"),
        (["--steps", "9"], "--steps=9"),
        (["--kils", "3"], "did you mean --kills"),
        (["--restarts", "slurm"], "--restarts=slurm"),
        (["--train.steps=9"], "--train.steps: in a campaign this is --steps"),
        (["--run_dir=x"], "--run_dir"),
        (["--train.sed=3"], "train.sed"),
        (["--parallel.tensor=3"], "parallel.tensor=3"),
        (["--keep_dir", "."], "--keep_dir=."),
        (["--out", "nowhere/table.txt"], "--out=nowhere/table.txt"),
        (["--data.train=nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_bad_input_is_refused_before_anything_starts(words: list[str], named: str, tmp_path: Path) -> None:
    write_text(tmp_path, documents=5)
    config = write_config(tmp_path / "config.yaml", tiny_config(tmp_path))
    given = words if "--nproc" in words else ["--nproc", "2", *words]
    with pytest.raises(UserError, match=re.escape(named)):
        main(["--config", str(config), *given])


def test_ranks_die_with_their_torchrun(tmp_path: Path) -> None:
    """One of them is stopped and the other waits for it in a collective: only the kernel can end both."""
    job = [str(ROOT / "tests/distributed/failure_job.py"), "stop", "collective", "1", "200"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *job]
    process = subprocess.Popen(
        torchrun, env={**environment(), MARK: str(tmp_path), FIRST: "0"}, stderr=subprocess.DEVNULL
    )

    def stopped() -> bool:
        ranks = [p.pid for p in processes(tmp_path) if p.attempt is not None]
        return any(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T" for pid in ranks)

    try:
        deadline = time.monotonic() + 240
        while not stopped():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.kill()
        process.wait()
        deadline = time.monotonic() + 20
        while processes(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not processes(tmp_path)
    finally:
        process.kill()
        for left in processes(tmp_path):
            os.kill(left.pid, signal.SIGKILL)


def test_a_rank_whose_torchrun_died_before_ends_by_itself(tmp_path: Path) -> None:
    """No signal comes for a death in the past."""
    rank = "import os, time\nfrom llm.parallel.launch.process import end_with_torchrun\n"
    rank += "while os.getppid() == PARENT: time.sleep(0.01)\n"
    rank += f"end_with_torchrun()\nopen({str(tmp_path / 'alive')!r}, 'w')"
    launcher = (
        "import os, subprocess, sys\n"
        f"p = subprocess.Popen([sys.executable, '-c', {rank!r}.replace('PARENT', str(os.getpid()))])\n"
        "print(p.pid)"
    )
    env = {**environment(), "TORCHELASTIC_RUN_ID": "test", "RANK": "0"}
    done = subprocess.run([sys.executable, "-c", launcher], env=env, capture_output=True, text=True, timeout=60)
    # which returned when the rank, too, had closed its standard error
    if "torchrun died" not in done.stderr and Path("/proc/1/cmdline").read_bytes().find(b"python") >= 0:
        pytest.skip("process 1 could be a torchrun here")
    assert "torchrun died before this rank had begun" in done.stderr
    assert not (tmp_path / "alive").exists()


@pytest.mark.full
def test_sixty_kills(tmp_path: Path) -> None:
    """Thirty on tensor x data parallel ranks, thirty under ZeRO-3; brought back by torchrun and by command in turns."""
    again = 0
    for name, (nproc, parallel, checkpoint) in FULL.items():
        folder = tmp_path / name.replace(" ", "_")
        write_text(folder)
        write_config(folder / "config.yaml", tiny_config(folder, parallel=parallel, checkpoint=checkpoint))
        report = campaign(folder, "--nproc", str(nproc), "--kills", "30", timeout=3000)
        assert "left out: no place" in report
        again += steps_made_again(report)
    assert again >= 100
