"""Train a language model.

    torchrun --nproc_per_node 2 launch/pretrain.py --config configs/pretrain/quickstart.yaml [--train.steps=200 ...]

    python launch/pretrain.py --nproc 2 --config ...      # the same on one machine, without torchrun's own flags

The same command again resumes. `--dry_run` checks and prints the resolved config, and memory and
traffic of the layout; `--help` lists every key.

    python launch/pretrain.py --run_dir runs/quickstart --replay_step 120

rebuilds step 120 of a run and lists its documents, the highest loss first.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import llm.installed  # noqa: F401  (says in one line what is missing)

from llm.jobs.pretrain import Pretrain
from llm.jobs.runner import run_job
from llm.parallel.launch import process


def main() -> None:
    run_job(Pretrain, __file__)


if __name__ == "__main__":
    process.run(main)
