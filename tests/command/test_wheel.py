"""An installed wheel does without the repository: it has every file of the packages, makes the quickstart's data and
trains on it."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from llm.environment import alone
from tests.shared import ROOT

pytestmark = [pytest.mark.full, pytest.mark.distributed]
LEFT_OUT = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__")
"""What a clean copy of the tree does without; a build/ of before would come into the wheel."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "lattice"
    shutil.copytree(ROOT, folder, ignore=LEFT_OUT)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path) -> Path:
    """Built with this environment's setuptools: there may be no network."""
    words = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(source.parent), str(source)]
    said(sys.executable, "-m", "pip", *words, cwd=source.parent)
    (file,) = source.parent.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of a new environment with the wheel, beside the packages of this one.

    Those are reached by a path file. Python looks for path files in an environment's own folder only, so the one that
    makes the repository importable here (an editable installation) says nothing there.
    """
    folder = tmp_path_factory.mktemp("installed")
    said(sys.executable, "-m", "venv", str(folder), cwd=folder)
    programs = folder / "bin"
    said(str(programs / "python"), "-m", "pip", "install", "--no-deps", "--no-index", str(wheel), cwd=folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return programs


def run(*words: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    """A command that knows of no repository."""
    kept = {name: value for name, value in alone().items() if name != "PYTHONPATH" and not name.startswith("PYTEST")}
    kept |= {"OMP_NUM_THREADS": "1"}
    return subprocess.run(words, cwd=cwd, env=kept, capture_output=True, text=True, timeout=1200)


def said(*words: str, cwd: Path) -> str:
    """What it prints; AssertionError with what it says where it fails."""
    done = run(*words, cwd=cwd)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


def test_a_wheel_has_every_file_of_its_packages(source: Path, wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    files = [path for room in ("llm", "vision") for path in (source / room).rglob("*") if path.is_file()]
    shipped = [path for room in ("launch", "configs") for path in (source / room).rglob("*") if path.is_file()]
    assert {path.relative_to(source).as_posix() for path in files} <= names
    assert {f"llm/_shipped/{path.relative_to(source).as_posix()}" for path in shipped} <= names
    assert not [name for name in names if name.split("/")[0] in ("launch", "tools", "configs", "tests", "docs")]


def test_it_is_the_wheel_that_is_imported_and_has_a_version(installed: Path, tmp_path: Path) -> None:
    program = "import llm, vision, torch; print(llm.__file__, vision.__file__, sep='\\n')"
    files = said(str(installed / "python"), "-c", program, cwd=tmp_path).splitlines()
    assert len(files) == 2 and all(Path(file).is_relative_to(installed.parent) for file in files), files
    assert said(str(installed / "lattice"), "--version", cwd=tmp_path).split()[:1] == ["lattice"]


def test_the_quickstart_says_how_its_data_is_made_then_trains(installed: Path, tmp_path: Path) -> None:
    lattice = str(installed / "lattice")
    train = [lattice, "train", "--config", "quickstart", "--nproc", "1", "--train.steps=3", "--optim.warmup_steps=1"]
    train += ["--train.global_batch_size=4", "--train.seq_len=128", "--eval.rows=4", "--eval.sample_tokens=4"]
    refused = run(*train, cwd=tmp_path)
    assert (refused.returncode, refused.stdout) == (2, "")
    (line,) = refused.stderr.splitlines()
    assert line.startswith("error: data.train=runs/data/stdlib/train: no such file or directory; `lattice quickstart ")

    said(lattice, *line.partition("`lattice ")[2].partition("`")[0].split(), cwd=tmp_path)
    printed = said(*train, cwd=tmp_path)
    assert "done: 3 steps" in printed
    run_dir = tmp_path / "runs/quickstart"
    assert (run_dir / "report.html").stat().st_size > 10_000
    assert [path.name for path in (run_dir / "checkpoints").iterdir() if path.name.startswith("step_")]
    assert os.listdir(tmp_path) == ["runs"]
    text = said(lattice, "generate", "--model", str(run_dir), "--prompt", "def ", "--max_new_tokens=4", cwd=tmp_path)
    assert text
