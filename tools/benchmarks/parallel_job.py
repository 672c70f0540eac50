"""Run under torchrun: time training steps of one layout, and the part of them in which ranks talk or wait for talk.

    torchrun --nproc_per_node 2 tools/benchmarks/parallel_job.py TASK OUT

TASK is a JSON file: model (ModelArgs), layout (keys of `parallel`), precision, batch (rows of a step), micro_batches
(in which a rank cuts its rows), seq_len, steps.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llm.args import ModelArgs
from llm.batch import Batch, Targets
from llm.data.batch import StepBatch
from llm.datatypes import TransformerInput
from llm.objectives import objectives_of
from llm.parallel.collectives import gather_json
from llm.parallel.engine.build import build_replica
from llm.parallel.engine.engine import Engine
from llm.parallel.grid import Grid, make_grid
from llm.parallel.launch import process
from llm.parallel.layout import Layout
from llm.tasks import task_named
from llm.train.config import OptimConfig
from llm.train.optimizer import make_optimizer

COLLECTIVES = (
    "all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single", "broadcast", "all_gather",
    "reduce",
)  # fmt: skip
WARMUP = 3
LM = objectives_of(task_named("lm").objectives())


class Clock:
    """Seconds that this process spends inside blocking collectives."""

    def __init__(self) -> None:
        self.seconds = 0.0
        for name in COLLECTIVES:
            setattr(dist, name, self._timed(getattr(dist, name)))

    def _timed(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return collective(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began

        return timed


def batch_of(grid: Grid, vocab: int, rows: int, seq_len: int, micro_batches: int) -> StepBatch:
    """This rank's rows of a random batch, the same every step, one document each; the counts are those of all ranks."""
    draw = torch.Generator().manual_seed(0)
    stream = torch.randint(0, vocab, (rows, seq_len + 1), generator=draw)
    parts = stream[grid.rows.rank :: grid.rows.size].chunk(micro_batches)
    bounds = torch.arange(0, len(parts[0]) * seq_len + 1, seq_len, dtype=torch.int32)
    made = [
        Batch(TransformerInput(part[:, :-1].contiguous(), cu_seqlens=bounds), {"lm": Targets(part[:, 1:].contiguous())})
        for part in parts
    ]
    own = LM.count(made)
    return StepBatch(made, own.with_values([count * grid.rows.size for count in own.values()]), 0, rows, wait_s=0.0)


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    process.quiet_libraries()
    world = process.start(600, 1)
    args, layout = ModelArgs.model_validate(task["model"]), Layout(world.size, **task["layout"])
    grid = make_grid(world, layout)
    replica = build_replica(args, 0, grid, zero_stage=layout.zero_stage, precision=task["precision"])
    rows, cuts = task["batch"] // grid.rows.size, task["micro_batches"]
    engine = Engine(
        replica,
        make_optimizer(replica.model, OptimConfig()),
        objectives=LM,
        precision=task["precision"],
        micro_batch_size=rows // cuts,
        max_accumulation=cuts,
        clip_norm=1.0,
        seed=0,
        zero_stage=layout.zero_stage,
    )
    batch = batch_of(grid, args.vocab_size, task["batch"], task["seq_len"], cuts)
    clock = Clock()
    seconds, talking, loss = [], [], 0.0
    for _ in range(WARMUP + task["steps"]):
        dist.barrier()
        began, before = time.perf_counter(), clock.seconds
        loss = engine.step(batch, batch.counts, 1e-3).loss
        seconds.append(time.perf_counter() - began)
        talking.append(clock.seconds - before)
    mine = [statistics.median(seconds[WARMUP:]), statistics.median(talking[WARMUP:])]
    everyone = gather_json(mine, world)
    if world.is_main:
        step, share = (statistics.mean(column) for column in zip(*everyone, strict=True))
        Path(sys.argv[2]).write_text(json.dumps({"step": step, "talking": share, "loss": loss}))


if __name__ == "__main__":
    process.run(main)
