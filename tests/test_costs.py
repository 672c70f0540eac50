"""The budget of the tests: every folder of tests has its seconds, and a folder that takes more is named."""

import pytest

from tests import conftest


def test_every_folder_of_tests_has_a_budget() -> None:
    folders = {path.parent.relative_to(conftest.TESTS.parent).as_posix() for path in conftest.TESTS.rglob("test_*.py")}
    assert folders == set(conftest.allowed("units"))
    assert set(conftest.allowed("jobs")) <= folders


def test_a_folder_beyond_its_budget_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = conftest.allowed("units")["tests/data"]
    monkeypatch.setattr(conftest, "SPENT", {"tests/data": limit + 1, "tests/model": 1.0, "tests/new": 0.5})
    known, new = conftest.over_budget("units")
    assert known.startswith(f"tests/budget.toml: [units] tests/data took {limit + 1:.0f} CPU seconds of {limit:.0f}; ")
    assert "tests/new took" in new and "of 0" in new


def test_a_slower_machine_may_take_longer_and_a_faster_one_no_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conftest, "_SLOWNESS", [1.0])
    here = conftest.allowed("jobs")["tests/distributed"]
    monkeypatch.setattr(conftest, "_SLOWNESS", [2.0])
    assert conftest.allowed("jobs")["tests/distributed"] == 2 * here
    monkeypatch.setattr(conftest, "_SLOWNESS", [0.5])
    assert conftest.allowed("jobs")["tests/distributed"] == here
