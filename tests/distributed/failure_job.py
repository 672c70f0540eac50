"""A small job in which one rank meets one fault at one place: under torchrun, or started by `--nproc N`.

    failure_job.py FAULT PLACE RANK TIMEOUT_S [--mark=ANY] [--nproc N]
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from llm.errors import UserError
from llm.parallel.collectives import main_decides
from llm.parallel.grid import make_grid
from llm.parallel.launch import local, process
from llm.parallel.launch.world import World

ENTER_S = 1.0
"""What the others need to be waiting at the place of the fault."""


def _raise() -> None:
    raise ValueError("the disk is on fire")


def _user_error() -> None:
    raise UserError("data.train=here.txt: the disk is on fire")


FAULTS: dict[str, Callable[[], Any]] = {
    "raise": _raise,
    "user": _user_error,
    "_exit": lambda: os._exit(3),
    "exit": lambda: sys.exit(4),
    "exit0": lambda: sys.exit(0),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "segfault": lambda: ctypes.string_at(0),
}
PLACES = (
    "import", "before_start", "before_collective", "collective", "subgroup", "decision", "deepspeed", "step",
    "pipeline", "barrier",
)  # fmt: skip


def arguments() -> tuple[str, str, int, float]:
    """Fault, place, rank, time-out in seconds."""
    fault, place, rank, timeout_s, *_ = (word for word in sys.argv[1:] if not word.startswith("--"))
    return fault, place, int(rank), float(timeout_s)


def here(place: str) -> None:
    """The fault, where this is its place and its rank; the others go on."""
    fault, its_place, rank, _ = arguments()
    if place == its_place and os.environ.get("RANK") == str(rank):
        if place not in ("import", "before_start", "before_collective"):
            time.sleep(ENTER_S)
        FAULTS[fault]()


def wait_in_sub_groups(world: World, faulty: int) -> None:
    """The faulty rank is awaited by a second one, and that one by the others, who never meet the faulty one."""
    second = (faulty + 1) % world.size
    pair = dist.new_group([faulty, second])
    rest = dist.new_group([r for r in range(world.size) if r != faulty])
    here("subgroup")
    if world.rank in (faulty, second):
        dist.all_reduce(torch.ones(1), group=pair)
    if world.rank != faulty:
        dist.all_reduce(torch.ones(1), group=rest)


class _FaultInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        here("step")
        return grad


def train_by_deepspeed(world: World) -> None:
    """One step under ZeRO-1; DeepSpeed sends rank 0's weights to all while it initialises."""
    from llm.parallel.engine import deepspeed_private as private

    broadcast = dist.broadcast

    def broadcast_with_fault(*args: Any, **kwargs: Any) -> Any:
        here("deepspeed")
        return broadcast(*args, **kwargs)

    dist.broadcast = broadcast_with_fault
    model = nn.Linear(8, 8)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}}
    engine = private.initialize(model, torch.optim.AdamW(model.parameters()), config, make_grid(world))
    engine.backward(_FaultInBackward.apply(engine(torch.ones(1, 8))).sum())
    engine.step()


def train_through_stages(world: World) -> None:
    """Steps of a pipeline with a stage on every rank; the fault comes in the second one, amid its micro-batches."""
    from llm.model import LLM
    from tests.distributed.engine_job import ROWS, build, train

    case = {"pipeline": world.size, "accumulation": ROWS}
    engine, context, forwards = build(case, world), LLM.context, iter(range(ROWS * 3))

    def context_with_fault(self: LLM, *args: Any) -> Any:
        if next(forwards) == ROWS + ROWS // 2:
            here("pipeline")
        return context(self, *args)

    LLM.context = context_with_fault  # type: ignore[method-assign]
    train(engine, case, range(3))


def main() -> None:
    words = sys.argv[1:]
    if "--nproc" in words:
        at = words.index("--nproc")
        sys.exit(local.torchrun(__file__, words[:at], int(words[at + 1]), 1))
    _, place, rank, timeout_s = arguments()
    here("before_start")
    world = process.start(timeout_s, 1)
    here("before_collective")
    dist.all_reduce(torch.ones(1))
    here("collective")
    dist.all_reduce(torch.ones(1))
    if place == "subgroup":
        wait_in_sub_groups(world, rank)
    main_decides(lambda: here("decision"), world)
    if place in ("deepspeed", "step"):
        train_by_deepspeed(world)
    if place == "pipeline":
        train_through_stages(world)
    here("barrier")


if __name__ == "__main__":
    here("import")
    process.run(main)
