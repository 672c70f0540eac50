"""Bad input ends the job with one line that names the key or the file, without a traceback and without leaving
anything behind.
"""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import ROOT, command, environment, run, tiny_config, write_config, write_text
from tests.distributed.runs import perform

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    write_text(folder, documents=60)
    return folder


def finished_run(text: Path, **data: str) -> dict[str, Any]:
    """The config of a run of four steps with a checkpoint after every second one."""
    short = {"train": {"steps": 4}, "checkpoint": {"interval": 2}, "optim": {"warmup_steps": 2}}
    return tiny_config(text, data=data, **short)


@pytest.fixture(scope="module")
def finished(text: Path) -> Path:
    """Such a run, which tests copy with its cache, as starts of the training script take long."""
    config = finished_run(text, cache_dir=str(text / "made" / "cache"))
    perform(text, [{"name": "made/run", "config": config}], nproc=1)
    return text / "made"


def refuse(text: Path, tmp_path: Path, *flags: str, nproc: int | None = None, **sections: dict[str, Any]) -> str:
    """Run with the given flags and config sections, which must be refused; the one line it prints."""
    config = write_config(tmp_path / "config.yaml", tiny_config(text, **sections))
    done = run("launch/pretrain.py", "--config", str(config), "--run_dir", str(tmp_path / "run"), *flags, nproc=nproc)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists(), "something half-made was left"
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.mark.parametrize(
    ("flags", "sections", "expected"),
    [
        (["--train.stesp=3"], {}, "unknown key train.stesp; did you mean train.steps?"),
        ([], {"data": {"train": "no/such/file.jsonl"}}, "no/such/file.jsonl"),
        ([], {"data": {"valid": "no/such/valid.jsonl"}}, "data.valid=no/such/valid.jsonl"),
        ([], {"tokenizer": {"kind": "sentencepiece", "path": "no/such/file.model"}}, "no/such/file.model"),
        (["--nproc=2", "--parallel.expert=2", "--parallel.zero_stage=3"], {}, "parallel.zero_stage=3 needs"),
        ([], {"model": {"max_seq_len": 10**6}, "train": {"seq_len": 500_000}}, "train.seq_len=500000"),
    ],
)
def test_bad_input_is_one_line(
    text: Path, tmp_path: Path, flags: list[str], sections: dict[str, dict[str, Any]], expected: str
) -> None:
    assert expected in refuse(text, tmp_path, *flags, **sections)


def test_two_processes_refuse_with_one_line(text: Path, tmp_path: Path) -> None:
    line = refuse(text, tmp_path, "--nproc=2", tokenizer={"kind": "characters", "path": "no/such/letters.json"})
    assert "no/such/letters.json" in line


def test_torchrun_repeats_the_line_in_its_own_report(text: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.yaml", tiny_config(text, train={"global_batch_size": 7}))
    done = run("launch/pretrain.py", "--config", str(config), nproc=2)
    assert done.returncode != 0
    first = done.stderr.index("error: train.global_batch_size=7")
    assert "train.global_batch_size=7" in done.stderr[first + 40 :], (
        "the root cause that torchrun prints last must name the key"
    )


def test_a_layout_that_does_not_work_is_refused_before_the_ranks_meet(text: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.yaml", tiny_config(text, parallel={"tensor": 3}))
    # rank 0 of 6, alone: at a rendezvous it would wait for its peers and then fail in another way
    peerless = {"RANK": "0", "WORLD_SIZE": "6", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run(
        command("launch/pretrain.py", "--config", str(config), "--run_dir", str(tmp_path / "run")),
        env={**environment(), **peerless},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: parallel.tensor=3 does not divide model.n_heads=4; ")
    assert not (tmp_path / "run").exists()


def test_torchrun_ends_a_layout_that_does_not_work_with_its_key(text: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.yaml", tiny_config(text, parallel={"tensor": 3}))
    done = run("launch/pretrain.py", "--config", str(config), "--run_dir", str(tmp_path / "run"), "--dry_run", nproc=2)
    assert done.returncode != 0 and not (tmp_path / "run").exists()
    reported = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert reported == [
        "error: parallel.tensor=3 does not divide the number of ranks, 2; "
        "nearest that works on 2 ranks: parallel.tensor=2"
    ]


def test_a_corrupt_shard_is_named(text: Path, finished: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(finished / "cache", cache)
    assert list(cache.rglob("*.arrow"))
    for shard in cache.rglob("*.arrow"):
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    assert ".arrow" in refuse(text, tmp_path, data={"cache_dir": str(cache)})


def test_a_truncated_checkpoint_is_named_when_asked_for_and_skipped_otherwise(
    text: Path, finished: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "config.yaml", finished_run(text))
    run_dir = tmp_path / "run"
    arguments = ["--config", str(config), "--run_dir", str(run_dir)]
    shutil.copytree(finished / "run", run_dir)
    damaged = run_dir / "checkpoints" / "step_00000004"
    file = damaged / "rank_00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])

    elsewhere = ["--config", str(config), "--run_dir", str(tmp_path / "elsewhere")]
    explicit = run("launch/pretrain.py", *elsewhere, f"--checkpoint.resume={damaged}")
    assert explicit.returncode == 2
    assert str(file) in explicit.stderr and len(explicit.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "elsewhere").exists()

    automatic = run("launch/pretrain.py", *arguments)
    assert automatic.returncode == 0, automatic.stderr
    assert f"skipped a checkpoint, now set aside: {file}" in automatic.stdout
    assert "step_00000002 (step 2" in automatic.stdout
    steps = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert steps == ["damaged_step_00000004", "step_00000002", "step_00000004"]

    for path in (run_dir / "checkpoints").glob("step_*/rank_00000.safetensors"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1  # inside a tensor: the length is right, the digest is not
        path.write_bytes(content)
    hopeless = run("launch/pretrain.py", *arguments)
    assert hopeless.returncode == 2
    assert "no valid checkpoint" in hopeless.stderr


def test_a_config_of_another_model_is_refused_with_all_differences(text: Path, finished: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.yaml", finished_run(text))
    arguments = ["--config", str(config), "--run_dir", str(tmp_path / "run")]
    shutil.copytree(finished / "run", tmp_path / "run")
    before = (tmp_path / "run" / "config.yaml").read_text()
    done = run("launch/pretrain.py", *arguments, "--optim.lr=0.5", "--model.ffn_hidden=64", "--train.steps=5")
    assert done.returncode == 2
    assert "optim.lr: 0.001 -> 0.5" in done.stderr and "model.ffn_hidden: 48 -> 64" in done.stderr
    assert (tmp_path / "run" / "config.yaml").read_text() == before


def test_a_run_dir_that_is_a_file_is_named(text: Path, tmp_path: Path) -> None:
    (tmp_path / "occupied").write_text("a file")
    config = write_config(tmp_path / "config.yaml", tiny_config(text))
    done = run("launch/pretrain.py", "--config", str(config), "--run_dir", str(tmp_path / "occupied"), "--nproc=2")
    assert done.returncode == 2
    assert str(tmp_path / "occupied") in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_text_without_documents_is_named_by_two_processes_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("")
    (tmp_path / "valid.jsonl").write_text('{"text": "a"}\n')
    line = refuse(tmp_path, tmp_path, "--nproc=2")
    assert f"data.train={tmp_path / 'train.jsonl'}" in line
    assert not list(tmp_path.glob("cache/*")), "a half-made cache was left"


def test_a_named_checkpoint_begins_a_new_run_and_a_restart_goes_on_from_there(
    text: Path, finished: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "config.yaml", finished_run(text))
    first = ["--config", str(config), "--run_dir", str(tmp_path / "first")]
    shutil.copytree(finished / "run", tmp_path / "first")
    back = f"--checkpoint.resume={tmp_path / 'first' / 'checkpoints' / 'step_00000002'}"
    inside = run("launch/pretrain.py", *first, back)
    assert inside.returncode == 2 and "give another --run_dir" in inside.stderr
    second = ["--config", str(config), "--run_dir", str(tmp_path / "second"), back]
    begun = run("launch/pretrain.py", *second, "--train.steps=6")
    assert begun.returncode == 0 and "first/checkpoints/step_00000002 (step 2" in begun.stdout, begun.stderr
    again = run("launch/pretrain.py", *second, "--train.steps=8")
    assert again.returncode == 0 and "second/checkpoints/step_00000006 (step 6" in again.stdout, again.stderr
