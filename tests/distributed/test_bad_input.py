"""Bad input ends the job with one line that names the key or the file, without a traceback and without leaving
anything behind.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import run, tiny_config, write_config, write_text

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    write_text(folder, documents=60)
    return folder


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
        ([], {"train": {"stesp": 3}}, "unknown key train.stesp; did you mean steps?"),
        (["--train.stesp=3"], {}, "unknown key train.stesp; did you mean steps?"),
        (["--runn_dir=x"], {}, "unknown flag --runn_dir; did you mean --run_dir?"),
        (["--dry_run=maybe"], {}, "--dry_run=maybe: expected true or false"),
        (["--log.tensorboard=perhaps"], {}, "log.tensorboard='perhaps'"),
        (["--train.steps=many"], {}, "train.steps='many'"),
        (["stray"], {}, "unexpected word 'stray'"),
        ([], {"data": {"train": "no/such/file.jsonl"}}, "no/such/file.jsonl"),
        ([], {"tokenizer": {"kind": "sentencepiece", "path": "no/such/file.model"}}, "no/such/file.model"),
        (
            [],
            {"train": {"global_batch_size": 7}},
            "train.global_batch_size=7 is not divisible by train.micro_batch_size=4",
        ),
        ([], {"model": {"n_kv_heads": 3}}, "n_kv_heads=3"),
        ([], {"model": {"layer_pattern": ["attn:sideways"]}}, "sideways"),
        ([], {"parallel": {"tensor": 2}}, "parallel.tensor=2"),
        (["--optim.min_lr=1"], {}, "optim.min_lr=1"),
    ],
)
def test_bad_config_is_one_line(
    text: Path, tmp_path: Path, flags: list[str], sections: dict[str, dict[str, Any]], expected: str
) -> None:
    assert expected in refuse(text, tmp_path, *flags, **sections)


def test_false_on_the_command_line_is_false(text: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.yaml", tiny_config(text, log={"tensorboard": True}))
    done = run("launch/pretrain.py", "--config", str(config), "--dry_run", "--log.tensorboard=false")
    assert done.returncode == 0, done.stderr
    assert "tensorboard: false" in done.stdout


def test_a_missing_config_file_is_named(tmp_path: Path) -> None:
    done = run("launch/pretrain.py", "--config", str(tmp_path / "nowhere.yaml"))
    assert done.returncode == 2
    assert done.stderr.strip() == f"error: {tmp_path / 'nowhere.yaml'}: No such file or directory"


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


def test_a_corrupt_shard_is_named(text: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = write_config(tmp_path / "first.yaml", tiny_config(text, data={"cache_dir": str(cache)}, train={"steps": 1}))
    made = run("launch/pretrain.py", "--config", str(first), "--run_dir", str(tmp_path / "first"))
    assert made.returncode == 0, made.stderr
    for shard in cache.rglob("*.arrow"):
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    assert ".arrow" in refuse(text, tmp_path, data={"cache_dir": str(cache)})


def test_a_truncated_checkpoint_is_named_when_asked_for_and_skipped_otherwise(text: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.yaml", tiny_config(text, train={"steps": 4}, checkpoint={"interval": 2}))
    run_dir = tmp_path / "run"
    arguments = ["--config", str(config), "--run_dir", str(run_dir)]
    assert run("launch/pretrain.py", *arguments).returncode == 0
    damaged = run_dir / "checkpoints" / "step_00000004"
    file = damaged / "rank_00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])

    explicit = run("launch/pretrain.py", *arguments, f"--checkpoint.resume={damaged}")
    assert explicit.returncode == 2
    assert str(file) in explicit.stderr and len(explicit.stderr.strip().splitlines()) == 1

    automatic = run("launch/pretrain.py", *arguments)
    assert automatic.returncode == 0, automatic.stderr
    assert f"skipped a checkpoint: {file}" in automatic.stdout
    assert "step_00000002 (step 2" in automatic.stdout

    for path in (run_dir / "checkpoints").glob("step_*/rank_00000.safetensors"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1  # inside a tensor: the length is right, the digest is not
        path.write_bytes(content)
    hopeless = run("launch/pretrain.py", *arguments)
    assert hopeless.returncode == 2
    assert "no valid checkpoint" in hopeless.stderr


def test_a_config_of_another_model_is_refused_with_all_differences(text: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.yaml", tiny_config(text, train={"steps": 2}, checkpoint={"interval": 1}))
    arguments = ["--config", str(config), "--run_dir", str(tmp_path / "run")]
    assert run("launch/pretrain.py", *arguments).returncode == 0
    before = (tmp_path / "run" / "config.yaml").read_text()
    done = run("launch/pretrain.py", *arguments, "--optim.lr=0.5", "--model.ffn_hidden=64", "--train.steps=3")
    assert done.returncode == 2
    assert "optim.lr: 0.001 -> 0.5" in done.stderr and "model.ffn_hidden: 48 -> 64" in done.stderr
    assert (tmp_path / "run" / "config.yaml").read_text() == before
    shutil.rmtree(tmp_path / "run")
