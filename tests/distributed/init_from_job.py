"""Run under torchrun: a few steps on several layouts, each begun with weights from elsewhere.

Arguments: a JSON list of [name, run config], and the folder in which each run gets its own.
"""

import json
import sys
from pathlib import Path

from llm.parallel.launch import process
from llm.train.config import validate
from llm.train.trainer import Trainer


def main() -> None:
    runs, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    process.quiet_libraries()
    world = process.start(60, 1)
    for name, raw in runs:
        Trainer(validate(raw, name), out / name, world).fit()


if __name__ == "__main__":
    process.run(main)
