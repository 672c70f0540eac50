"""Run under torchrun: tools/layouts_job.py with two planted faults. Whole parameters keep only their own rank's part of
the gradient where tensor parallelism should sum it, and expert parallelism fails.
"""

import sys
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from llm.parallel import build
from llm.parallel.engine import partial_gradients
from llm.parallel.launch import process
from tools import layouts_job


def forget(*_: Any) -> None:
    pass


def fail(*_: Any) -> None:
    raise RuntimeError("no experts today")


if __name__ == "__main__":
    partial_gradients.sum_together = partial_gradients.sum_each = forget
    build.ExpertExchange = fail  # type: ignore[assignment, misc]
    process.run(layouts_job.main)
