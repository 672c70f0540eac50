"""Run as one process: runs whose length, batch and sequences follow a plan, cut in two and uncut, and runs that stop
early.
"""

import sys
from pathlib import Path
from typing import Any

import yaml

from llm.parallel.launch import process
from llm.train.config import validate
from tests.train.schedules import CUTS, EPOCHS, PATIENCE, SCHEDULED


def main() -> None:
    config_path, out = Path(sys.argv[1]), Path(sys.argv[2])
    base = yaml.safe_load(config_path.read_text())
    process.quiet_libraries()
    world = process.start(60, 1)
    from llm.train.trainer import Trainer

    def fit(name: str, **sections: dict[str, Any]) -> None:
        raw = {**base, **{key: {**base.get(key, {}), **section} for key, section in sections.items()}}
        Trainer(validate(raw, name), out / name, world).fit()

    fit("whole", train={**SCHEDULED, **EPOCHS})
    for steps in CUTS:
        fit("cut", train={**SCHEDULED, "steps": steps})
    fit("cut", train={**SCHEDULED, **EPOCHS})
    fit("doubled", train={"global_batch_size": 8, "steps": 3})
    fit("doubled", train={**EPOCHS, "global_batch_size": 16})
    still = {"lr": 1e-30, "min_lr": 0.0}  # a model that does not move never improves on its first validation
    fit("early", optim=still, train={"steps": 6}, eval=PATIENCE)
    fit("early", optim=still, train={"steps": 6}, eval=PATIENCE)
    fit("early", optim=still, train={"steps": 6}, eval={**PATIENCE, "patience": 4})


if __name__ == "__main__":
    process.run(main)
