"""Run under torchrun: one run of the tiny model per accumulation and optimizer, all in one job to save start-up time.
"""

import sys
from pathlib import Path

import yaml

from llm.parallel.launch import process
from llm.train.config import validate

CASES = (("adamw", 1), ("adamw", 2), ("adamw", 4), ("sgd", 1))
"""Optimizer, and micro-batches of a step; test_layouts.py has SGD on every layout."""


def main() -> None:
    config_path, out = Path(sys.argv[1]), Path(sys.argv[2])
    raw = yaml.safe_load(config_path.read_text())
    process.quiet_libraries()
    world = process.start(60, 1)
    from llm.train.trainer import Trainer

    for optimizer, accumulation in CASES:
        raw["optim"]["name"] = optimizer
        raw["train"]["micro_batch_size"] = raw["train"]["global_batch_size"] // (world.size * accumulation)
        config = validate(raw, str(config_path))
        Trainer(config, out / f"{optimizer}-{world.size}x{accumulation}", world).fit()


if __name__ == "__main__":
    process.run(main)
