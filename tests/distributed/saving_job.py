"""Run under torchrun: runs that save behind the training and before it, and runs whose rank 1 has no room for a
checkpoint for some steps. The last of them ends the job.
"""

import resource
import sys
from pathlib import Path
from typing import Any

import yaml

from llm.parallel.launch import process
from llm.train.config import validate
from llm.train.trainer import Trainer

INTERVAL, STEPS = 2, 9
FULL = (5, 8)  # no room from the beginning of this step to the beginning of that one
LIMIT_BYTES = 40_000  # of a file: more than a log has, less than a checkpoint
CASES: dict[str, dict[str, Any]] = {
    "blocking": {"asynchronous": False},
    "behind": {"asynchronous": True},
    "blocking-full": {"asynchronous": False, "on_failure": "continue"},
    "behind-full": {"asynchronous": True, "on_failure": "continue"},
    "stopped-full": {"asynchronous": True, "on_failure": "stop"},
}


def fill_disk(trainer: Trainer, rank: int) -> None:
    """No room on one rank during FULL."""
    take_step = trainer.take_step
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(*args: Any) -> Any:
        if trainer.run.world.rank == rank and trainer.progress.step + 1 in FULL:
            limit = LIMIT_BYTES if trainer.progress.step + 1 == FULL[0] else soft
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        return take_step(*args)

    trainer.take_step = limited  # type: ignore[method-assign]


def main() -> None:
    config_path, out = Path(sys.argv[1]), Path(sys.argv[2])
    process.quiet_libraries()
    world = process.start(60, 1)
    for name, checkpoint in CASES.items():
        raw = yaml.safe_load(config_path.read_text())
        raw["checkpoint"] = {"interval": INTERVAL, "keep": 20, "keep_best": False, **checkpoint}
        trainer = Trainer(validate(raw, str(config_path)), out / name, world)
        if name.endswith("full"):
            fill_disk(trainer, rank=1)
        trainer.fit()


if __name__ == "__main__":
    process.run(main)
