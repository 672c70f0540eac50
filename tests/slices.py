"""The long tests in slices, of which `.ci/run` runs one: which one is a function of HEAD alone.

    python -m tests.slices [--number N]      # make test-slice

Every test in tests/slices.toml has passed ten times in a row with both cores loaded; a test comes in when it has.
"""

import argparse
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def slices() -> list[dict[str, Any]]:
    """Name, pytest runs (lists of words) and environment of each slice."""
    return list(tomllib.loads((ROOT / "tests/slices.toml").read_text())["slice"])


def number_of_head() -> int:
    """Commits up to HEAD, modulo the number of slices: the next commit has the next slice."""
    count = subprocess.run(["git", "rev-list", "--count", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    return int(count.stdout) % len(slices())


def environment(variables: dict[str, str]) -> dict[str, str]:
    """This process's, with the slice's variables; folders on a PYTHONPATH of its own count from the root."""
    own = dict(variables)
    if "PYTHONPATH" in own:
        own["PYTHONPATH"] = os.pathsep.join(
            [str(ROOT / own["PYTHONPATH"]), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
    return {**os.environ, **own}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, help="which slice; default: the one of HEAD")
    parser.add_argument("--costs", action="store_true", help="list the CPU time of tests")
    arguments = parser.parse_args()
    number = number_of_head() if arguments.number is None else arguments.number
    chosen = slices()[number]
    print(f"slice {number} of {len(slices())}: {chosen['name']}", flush=True)
    status = 0
    for words in chosen["runs"]:
        command = [sys.executable, "-m", "pytest", *words, *(["--costs"] if arguments.costs else [])]
        done = subprocess.run(command, cwd=ROOT, env=environment(chosen.get("environment", {})))
        status = status or done.returncode
    return status


if __name__ == "__main__":
    sys.exit(main())
