"""Run under torchrun: a few steps on several layouts, each begun with weights from elsewhere.

Arguments: a JSON list of [name, run config], and the folder in which each run gets its own.
"""

import json
import sys
from pathlib import Path

from llm.parallel import launch
from llm.train.config import validate
from llm.train.trainer import Trainer


def main() -> None:
    runs, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    launch.quiet_libraries()
    world = launch.start(60, 1)
    for name, raw in runs:
        Trainer(validate(raw, name), out / name, world).fit()


if __name__ == "__main__":
    launch.run(main)
