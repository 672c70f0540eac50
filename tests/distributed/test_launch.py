"""A run from the command line to sampled text, and on another number of ranks."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llm import LLM
from llm.checkpoint.run_folder import load_run_tokenizer
from llm.generate import generate
from tests.distributed.harness import (
    ROOT,
    environment,
    keep_port,
    metrics,
    run,
    tiny_config,
    write_config,
    write_text,
)
from tests.machine import has, needs

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on two processes of one machine, started without torchrun's flags; sampling, TensorBoard, bf16
    on.
    """
    folder = tmp_path_factory.mktemp("launch")
    write_text(folder)
    sections = {
        "train": {"steps": 12, "precision": "bf16" if has("bf16") else "fp32"},
        "checkpoint": {"interval": 4, "keep": 3},
        "eval": {"interval": 6, "sample_interval": 12, "sample_tokens": 8, "prompts": ["ab", ""]},
        "log": {"tensorboard": True, "report": True},
    }
    write_config(folder / "config.yaml", tiny_config(folder, **sections))
    done = run("launch/pretrain.py", *arguments(folder), "--nproc", "2")
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout)
    (folder / "stderr").write_text(done.stderr)
    return folder


def arguments(folder: Path) -> list[str]:
    return ["--config", str(folder / "config.yaml"), "--run_dir", str(folder / "run")]


def test_nothing_is_on_stderr(folder: Path) -> None:
    assert (folder / "stderr").read_text() == ""


def test_the_run_folder_holds_what_the_readme_lists(folder: Path) -> None:
    run_dir = folder / "run"
    assert {p.name for p in run_dir.iterdir()} == {
        "checkpoints",
        "config.yaml",
        "experts.jsonl",
        "log.txt",
        "metrics.jsonl",
        "report.html",
        "samples.jsonl",
        "starts.jsonl",
        "tb",
        "tokenizer",
    }
    rows = metrics(run_dir)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["step"] for row in rows if "valid_bits_per_byte" in row] == [6, 12]
    assert rows[-1]["tokens"] == 12 * 16 * 48
    assert "sample at step 12, prompt 'ab'" in (run_dir / "log.txt").read_text()
    assert "sample at step 12" in (folder / "stdout").read_text()
    assert f"report: {run_dir / 'report.html'}" == (folder / "stdout").read_text().splitlines()[-1]
    assert (run_dir / "report.html").read_text().count("<figure") > 10


def test_generate_continues_from_the_run_folder_and_from_a_checkpoint(folder: Path) -> None:
    run_dir = folder / "run"
    checkpoint = run_dir / "checkpoints" / "step_00000012"
    for path in (run_dir, checkpoint):
        done = run(
            "launch/generate.py", "--model", str(path), "--prompt", "ab", "--max_new_tokens", "6", "--stop=false",
            "--dtype=fp32",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        tokenizer, model = load_run_tokenizer(path), LLM.from_pretrained(path)
        (ids,) = generate(model, [[tokenizer.bos_id, *tokenizer.encode("ab")]], max_new_tokens=6)
        assert done.stdout == tokenizer.decode(ids) + "\n"


def test_generate_names_what_is_missing(folder: Path) -> None:
    done = run("launch/generate.py", "--model", str(folder / "nowhere"), "--prompt", "ab")
    assert done.returncode == 2
    assert str(folder / "nowhere") in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_the_masters_are_float32_and_not_rounded(folder: Path) -> None:
    needs("bf16")
    model = LLM.from_pretrained(folder / "run")
    weight = model.layers[0].attention.wq.weight
    assert not torch.equal(weight, weight.bfloat16().float())


def test_a_run_goes_on_with_another_number_of_ranks(folder: Path, tmp_path: Path) -> None:
    """On the same rows with the same optimizer state: the step after the change is the step that two ranks would have
    made.
    """
    longer = ["--config", str(folder / "config.yaml"), "--train.steps=14"]
    longer += ["--log.tensorboard=false", "--log.report=false", "--eval.sample_interval=null"]
    for name in ("two", "one"):
        shutil.copytree(folder / "run", tmp_path / name)
    two = run("launch/pretrain.py", *longer, "--run_dir", str(tmp_path / "two"), "--nproc=2")
    assert two.returncode == 0, two.stderr
    expected = metrics(tmp_path / "two")[12:14]
    one = run("launch/pretrain.py", *longer, "--run_dir", str(tmp_path / "one"), "--train.micro_batch_size=16")
    assert one.returncode == 0, one.stderr
    assert "step_00000012 (step 12" in one.stdout
    found = metrics(tmp_path / "one")[12:14]
    for row, wanted in zip(found, expected, strict=True):
        # bf16: the sums of one rank and of two round differently, at 2^-9 per value and far less in the
        # mean over 768 targets
        assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-3)
        assert row["tokens"] == wanted["tokens"] and row["targets"] == wanted["targets"]


def test_two_nodes_meet_by_the_readmes_command(tmp_path: Path) -> None:
    """Two torchruns on this machine stand for two nodes: the same command on each, one rendezvous address."""
    write_text(tmp_path, documents=60)
    config = write_config(tmp_path / "config.yaml", tiny_config(tmp_path, train={"steps": 3}))
    port = keep_port()
    address = f"127.0.0.1:{port.getsockname()[1]}"
    options = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint={address}"]
    node = [sys.executable, "-m", "torch.distributed.run", *options, "--rdzv_id=test", str(ROOT / "launch/pretrain.py")]
    words = [*node, "--config", str(config), "--run_dir", str(tmp_path / "run")]
    nodes = [
        subprocess.Popen(words, env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    with port:
        outputs = [process.communicate(timeout=240) for process in nodes]
    assert [process.returncode for process in nodes] == [0, 0], outputs
    assert sum("2 process(es)" in out for out, _ in outputs) == 1, "rank 0 alone reports"
    assert len(metrics(tmp_path / "run")) == 3
