"""An old Python, or one without the packages, is one line of a command, and an ImportError of the library."""

import subprocess
import sys
from pathlib import Path

import pytest

from llm import installed
from tests.shared import ROOT


def test_this_python_has_everything() -> None:
    assert installed.problem() is None


def test_what_is_missing_is_named_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "PACKAGES", ("torch", "no_such_package", "nor_this"))
    with pytest.raises(ImportError, match="without no_such_package, nor_this, which Lattice needs; `make setup` makes"):
        installed.check()
    monkeypatch.setattr(installed, "OLDEST", (99, 0))
    with pytest.raises(ImportError, match=r"is Python 3\.\d+; Lattice needs 99\.0 or later; `make setup`"):
        installed.check()


def test_python_in_a_folder_called_lattice_is_no_command(tmp_path: Path) -> None:
    folder = tmp_path / "lattice"
    folder.mkdir()
    line = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import llm"
    done = subprocess.run([sys.executable, "-S", "-c", line], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 1 and "ImportError" in done.stderr


COMMANDS = ("launch/pretrain.py", "launch/generate.py", "tools/convert.py", "tools/shard.py", "tools/inspect.py")
ISOLATED = ("-I", "-S")
"""Neither this environment's packages nor PYTHONPATH."""


@pytest.mark.parametrize("script", COMMANDS)
def test_a_command_of_a_python_without_packages_says_one_line(script: str) -> None:
    done = subprocess.run([sys.executable, *ISOLATED, str(ROOT / script), "--help"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "without torch, " in line and "use .venv/bin/python" in line


def test_so_does_the_one_command() -> None:
    # -S alone: -I would not look into the working directory for llm
    done = subprocess.run([sys.executable, "-S", "-m", "llm", "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "without torch, " in line
