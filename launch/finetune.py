"""Train a model further: on conversations, completions, preferences or text, all of its weights or adapters (`lora`).

    torchrun --nproc_per_node 2 launch/finetune.py --config configs/finetune/chat_lora.yaml [--train.epochs=2 ...]

    python launch/finetune.py --nproc 2 --config ...      # the same on one machine, without torchrun's own flags

Config, run folder and flags are those of launch/pretrain.py; `model.init_from` names the model to begin with. The
held-out rows are read before the first step, too. `--show 3` prints the first rows as the model will see them, with
what trains marked, and stops.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import llm.installed  # noqa: F401  (says in one line what is missing)

from llm.jobs.finetune import Finetune
from llm.jobs.runner import run_job
from llm.parallel.launch import process


def main() -> None:
    run_job(Finetune, __file__)


if __name__ == "__main__":
    process.run(main)
