"""Page faults tell whether memory that was freed was kept: each page that comes from the system has one."""

import os
import subprocess
import sys

import pytest

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


@pytest.mark.skipif(sys.platform != "linux" or os.confstr("CS_GNU_LIBC_VERSION") is None, reason="needs glibc")
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
