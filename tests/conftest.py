"""What the tests cost: CPU seconds per folder, against tests/budget.toml where `--budget` is given.

CPU seconds, not wall time: of this process and of all that it waited for, torchrun's ranks among them. They are those
of the machine that the budget was written on: a fixed piece of work is timed, and the budget grows by what it takes
longer here.
"""

import hashlib
import os
import statistics
import sys
import time
import tomllib
from collections import defaultdict
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TESTS = Path(__file__).parent
SPENT: defaultdict[str, float] = defaultdict(float)
SPENT_BY_TEST: dict[str, float] = {}
SLOWEST = 25


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--budget", choices=["units", "jobs"], help="fail where a folder takes more CPU time than allowed")
    parser.addoption("--costs", action="store_true", help="list the tests that take the most CPU time")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    before = cpu_seconds()
    result = yield
    spent = cpu_seconds() - before
    SPENT[item.path.parent.relative_to(TESTS.parent).as_posix()] += spent
    SPENT_BY_TEST[item.nodeid] = spent
    return result


def cpu_seconds() -> float:
    """Of this process, of those that it has waited for, and of the ranks that it keeps (tests/distributed/pool.py)."""
    pool = sys.modules.get("tests.distributed.pool")
    return sum(os.times()[:4]) + (pool.CPU_SECONDS[0] if pool else 0.0)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    if hasattr(config, "workeroutput"):  # a process of pytest-xdist: the one that started it adds them up
        config.workeroutput["spent"] = dict(SPENT)
        config.workeroutput["spent_by_test"] = SPENT_BY_TEST
        return
    kind = config.getoption("budget")
    if kind and over_budget(kind) and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for folder, seconds in getattr(node, "workeroutput", {}).get("spent", {}).items():
        SPENT[folder] += seconds
    SPENT_BY_TEST.update(getattr(node, "workeroutput", {}).get("spent_by_test", {}))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.getoption("costs"):
        terminalreporter.section("CPU seconds a test")
        for name, seconds in sorted(SPENT_BY_TEST.items(), key=lambda row: -row[1])[:SLOWEST]:
            terminalreporter.line(f"{seconds:8.1f}  {name}")
    kind = config.getoption("budget")
    if kind or config.getoption("costs"):
        terminalreporter.section("CPU seconds a folder")
        limits = allowed(kind) if kind else {}
        for folder, seconds in sorted(SPENT.items()):
            limit = f" of {limits.get(folder, 0):.0f}" if kind else ""
            terminalreporter.line(f"{seconds:8.1f}{limit}  {folder}")
        terminalreporter.line(f"{sum(SPENT.values()):8.1f}  in all; this machine takes {slowness():.2f} of the time")
        for line in over_budget(kind) if kind else ():
            terminalreporter.line(line, red=True)


def over_budget(kind: str) -> list[str]:
    """A line for each folder that took more than it may."""
    limits = allowed(kind)
    return [
        f"tests/budget.toml: [{kind}] {folder} took {seconds:.0f} CPU seconds of {limits.get(folder, 0):.0f}; "
        f"make its tests cheaper, or mark the long ones `full`"
        for folder, seconds in sorted(SPENT.items())
        if seconds > limits.get(folder, 0)
    ]


def allowed(kind: str) -> dict[str, float]:
    """CPU seconds of each folder on this machine."""
    table = tomllib.loads((TESTS / "budget.toml").read_text())
    factor = table["margin"] * max(1.0, slowness())
    return {folder: seconds * factor for folder, seconds in table[kind].items()}


_SLOWNESS: list[float] = []


def slowness() -> float:
    """How much longer a fixed piece of work takes here than where the budget was written; timed once."""
    if not _SLOWNESS:
        reference = tomllib.loads((TESTS / "budget.toml").read_text())["reference_s"]
        _SLOWNESS.append(statistics.median(fixed_work() for _ in range(5)) / reference)
    return _SLOWNESS[0]


def fixed_work() -> float:
    """CPU seconds of a piece of the interpreter's work, of small arrays and of memory traffic."""
    before = time.process_time()
    table: dict[int, str] = {}
    for i in range(300_000):
        table[i % 997] = str(i * i)
    digest = hashlib.blake2b(repr(sorted(table.items())).encode() * 20).digest()
    values = np.frombuffer(digest * 4000, dtype=np.uint8).astype(np.float64)
    for _ in range(300):
        values = np.sqrt(values * values + 1.0)
    return time.process_time() - before
