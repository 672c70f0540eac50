"""The slices of long tests: what they name exists, and HEAD alone decides which one runs."""

import re
import subprocess

import pytest

from tests import slices
from tests.shared import ROOT

NAMED = [(chosen["name"], word) for chosen in slices.slices() for words in chosen["runs"] for word in words]
FILES = [(name, word) for name, word in NAMED if word.startswith("tests/")]


@pytest.mark.parametrize(("name", "word"), FILES)
def test_every_test_of_a_slice_exists(name: str, word: str) -> None:
    path, *functions = re.sub(r"\[.*", "", word).split("::")
    text = (ROOT / path).read_text()
    assert all(f"def {function}(" in text for function in functions)


def test_neighbouring_commits_have_different_slices_and_the_same_commit_the_same() -> None:
    count = subprocess.run(["git", "rev-list", "--count", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if count.returncode:
        pytest.skip("this copy of the project has no git history")
    assert slices.number_of_head() == slices.number_of_head() == int(count.stdout) % len(slices.slices())


def test_a_slices_variables_reach_its_tests_beside_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "before")
    found = slices.environment({"PYTHONPATH": "tests/plain_cpu", "ONEDNN_MAX_CPU_ISA": "AVX2"})
    assert found["PYTHONPATH"].split(":") == [str(ROOT / "tests/plain_cpu"), "before"]
    assert found["ONEDNN_MAX_CPU_ISA"] == "AVX2" and "PATH" in found
