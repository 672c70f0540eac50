"""Run as one process: examples one after the other, each as a script of its own words, what it prints behind a line
with its name. They share what they import, which takes most of their time.
"""

import runpy
import sys
from pathlib import Path

from llm.parallel.launch import process
from tests.shared import ROOT


def main() -> None:
    folder = Path(sys.argv[1])
    for name, *words in (line.split("\t") for line in (folder / "examples.txt").read_text().splitlines()):
        print(f"<<<{name}>>>", flush=True)
        sys.argv = [name, *words]
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")


if __name__ == "__main__":
    process.run(main)
