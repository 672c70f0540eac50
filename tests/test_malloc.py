"""Page faults show whether memory that was freed was kept: each page that comes from the system has one."""

import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from llm.jobs import runner
from llm.parallel.launch import process
from llm.parallel.launch.world import World
from tests.shared import ROOT

PAGES = 64 << 20 >> 12  # of a tensor of 64 MiB
CODE = """
import resource, sys, torch
from llm import malloc
exec(sys.argv[1])

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64 << 18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first = [faults() for _ in range(30)]  # small pieces between the large ones settle
print(*(faults() for _ in range(5)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library does as it does")
@pytest.mark.parametrize(
    "setting, variable, kept",
    [
        ("malloc.keep_freed()", {}, True),
        ("malloc.keep_freed()", {"MALLOC_TOP_PAD_": "131072"}, False),
        ("malloc.give_back_freed(1 << 20)", {}, False),
    ],
)
def test_freed_memory_is_kept_or_given_back(setting: str, variable: dict[str, str], kept: bool) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", CODE, setting], env=env | variable, cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = [int(count) for count in done.stdout.split()]
    assert max(found) < PAGES / 10 if kept else min(found) > PAGES / 2, found


@pytest.mark.parametrize("device, kept", [("cpu", [True]), ("cuda", [])])
def test_a_run_on_a_cpu_keeps_its_memory(device: str, kept: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    class Started(Exception):
        pass

    def start(timeout_s: float, threads: int) -> None:
        raise Started

    asked: list[bool] = []
    monkeypatch.setattr(runner, "keep_freed", lambda: asked.append(True))
    monkeypatch.setattr(runner, "leave_before_first_step", lambda: None)
    monkeypatch.setattr(process, "read_world", lambda: World(0, 1, 0, torch.device(device)))
    monkeypatch.setattr(process, "start", start)
    with pytest.raises(Started):
        runner.work(SimpleNamespace(timeout_s=60.0, threads=1, work=None))  # type: ignore[arg-type]
    assert asked == kept
