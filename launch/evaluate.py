"""Evaluate a model on tasks.

    torchrun --nproc_per_node 2 launch/evaluate.py --model runs/quickstart --tasks arc_easy,piqa --output out/quickstart

    python launch/evaluate.py --nproc 2 --model ...      # the same on one machine, without torchrun's own flags
    python launch/evaluate.py --model ...                # one process

A task is the path of a YAML file, or the name of one in configs/evaluate. The same command again goes on where a killed
one stopped, on any number of ranks. `--dry_run` says what would be asked, and what memory it takes; `--help` lists the
flags.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import llm.installed  # noqa: F401  (says in one line what is missing)

from llm.jobs.evaluate import Evaluate
from llm.jobs.runner import run_job
from llm.parallel.launch import process


def main() -> None:
    run_job(Evaluate, __file__)


if __name__ == "__main__":
    process.run(main)
