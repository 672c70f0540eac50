"""Run under torchrun: whole runs through the Trainer, one after the other in one job to save start-up time.

Arguments: a JSON list of {"name", "config"}, and the folder for the runs. A run may continue a checkpoint of one before
it. A job of one process also writes how close the routers of each run came to another choice.
"""

import json
import sys
from pathlib import Path

from llm.parallel.engine import deepspeed_private as private
from llm.parallel.launch import process
from llm.train.config import validate
from llm.train.trainer import Trainer
from tools.layouts_job import RouterMargins

OVERFLOWS = (4, 9, 11)
"""Steps whose gradients are made non-finite in fp16. A real overflow depends on a rank's own rows, and so may come on
one layout and not on another."""
SCALER = {"cur_scale": 2.0**10, "scale_window": 4}
"""Of every new engine, whatever it then loads: DeepSpeed's own would not grow in so few steps."""


def main() -> None:
    plan, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    process.quiet_libraries()
    world = process.start(120, 1)
    for item in plan:
        trainer = Trainer(validate(item["config"], item["name"]), out / item["name"], world)
        if item["config"]["train"]["precision"] == "fp16":
            make_overflow(trainer)
        margins = RouterMargins(trainer.run.engine.model) if world.size == 1 else None
        trainer.fit()
        if margins:
            (out / item["name"] / "margin.json").write_text(json.dumps(margins.take()))


def make_overflow(trainer: Trainer) -> None:
    """Let the loss scale move: by growth, and at OVERFLOWS, where a loss above its limit gives NaN gradients."""
    private.set_loss_scaler_state(trainer.run.engine._deepspeed, SCALER)
    trainer.progress.guard.loss_limit = lambda: 0.0 if trainer.progress.step + 1 in OVERFLOWS else None  # type: ignore[method-assign]


if __name__ == "__main__":
    process.run(main)
