"""Run under torchrun on four processes: runs of the tiny model through the Trainer, all in one job to save start-up
time. Arguments: the config and the folder for the runs. Some of them continue a checkpoint of the first one.
"""

import sys
from pathlib import Path
from typing import Any

import yaml

from llm.parallel.launch import process
from llm.train.config import validate

CUT = {"tensor": 2, "expert": 2}
SAVED_STEP = 4
RUNS: dict[str, dict[str, Any]] = {
    "fresh": CUT,
    "again": CUT,
    "data_parallel": {},
    "pipelined": {"pipeline": 2, "expert": 2},
    "dualpipev": {"pipeline": 2, "pipeline_schedule": "dualpipev", "tensor": 2},
    "resumed": {**CUT, "continues": True},
    "resumed_data_parallel": {"zero_stage": 3, "continues": True},
}


def main() -> None:
    raw, out = yaml.safe_load(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    process.quiet_libraries()
    world = process.start(60, 1)
    from llm.train.trainer import Trainer

    for name, layout in RUNS.items():
        parallel = {key: value for key, value in layout.items() if key != "continues"}
        resume = str(out / "fresh" / "checkpoints" / f"step_{SAVED_STEP:08d}") if "continues" in layout else "auto"
        config = {
            **raw,
            "parallel": {"timeout_s": 60, **parallel},
            "checkpoint": {**raw["checkpoint"], "resume": resume},
        }
        Trainer(validate(config, name), out / name, world).fit()


if __name__ == "__main__":
    process.run(main)
