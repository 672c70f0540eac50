"""Run under torchrun: evaluations, one after the other in one job to save start-up time.

Argument: a JSON list of the words of each.
"""

import json
import sys
from pathlib import Path

from llm.evaluate.evaluation import evaluate
from llm.jobs.evaluate import Evaluate
from llm.parallel.grid import make_grid
from llm.parallel.launch import process


def main() -> None:
    process.quiet_libraries()
    world = process.start(120, 1)
    for words in json.loads(Path(sys.argv[1]).read_text()):
        job = Evaluate.parse(words)
        evaluate(job.flags.settings, make_grid(world, job.layout))


if __name__ == "__main__":
    process.run(main)
