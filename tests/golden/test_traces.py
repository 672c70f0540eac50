"""Runs of twelve steps are the recorded ones: bit for bit on the machine of the files, closely on any other.

A change that is to move numbers records them anew; see record.py.
"""

from collections.abc import Iterable

import pytest

from tests.golden.cases import SHORT, Case, every_case
from tests.golden.runs import Runs, run_cases
from tests.golden.trace import differences, load

pytestmark = pytest.mark.distributed

LONG = tuple(case for case in every_case() if case not in SHORT)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return run_cases(SHORT, tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return run_cases(LONG, tmp_path_factory.mktemp("golden"))


def each(cases: Iterable[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=str)


def check(case: Case, runs: Runs) -> None:
    golden = load(case.config)
    if not runs.ran(case):
        pytest.skip(f"{case}: this device has no {golden.precision} arithmetic")
    machine = runs.machine[case.ranks]
    found = list(differences(golden, case, runs.traces[case], machine, runs.text_digest, runs.of_one(case)))
    assert not found, "\n".join(found)


@each(SHORT)
def test_every_config_and_every_layout_is_as_recorded(case: Case, short: Runs) -> None:
    check(case, short)


@pytest.mark.full
@each(LONG)
def test_every_other_config_on_every_layout_is_as_recorded(case: Case, long: Runs) -> None:
    check(case, long)
