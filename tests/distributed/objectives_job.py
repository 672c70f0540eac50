"""Run on one rank or two: short runs for added objectives over two sources, a layout each. Arguments: the config, the
folder for the runs, and the layouts as JSON, by name.
"""

import json
import sys
from pathlib import Path

import yaml

from llm.parallel.launch import process
from llm.train.config import validate


def main() -> None:
    raw, out, layouts = yaml.safe_load(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), json.loads(sys.argv[3])
    process.quiet_libraries()
    world = process.start(60, 1)
    from llm.train.trainer import Trainer

    for name, layout in layouts.items():
        config = {**raw, "parallel": {"timeout_s": 60, **layout}}
        Trainer(validate(config, name), out / name, world).fit()


if __name__ == "__main__":
    process.run(main)
