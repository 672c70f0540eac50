"""Run under torchrun: the engine alone on a tiny model with everything on, one short training per case, all in one job
to save start-up time. Batches are a function of the step, cut over ranks and micro-batches.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm.args import ModelArgs
from llm.batch import IGNORE, Batch, Rows, Targets
from llm.compile import compile_blocks
from llm.data.batch import StepBatch
from llm.datatypes import TransformerInput
from llm.parallel.engine.build import build_replica
from llm.parallel.engine.engine import Engine
from llm.parallel.grid import Grid, make_grid
from llm.parallel.launch import process
from llm.parallel.launch.world import World
from llm.parallel.layout import Layout
from llm.parameters import ParameterTable
from llm.train.config import OptimConfig
from llm.train.optimizer import make_optimizer
from tests.data.helpers import LM
from tests.distributed.harness import TINY_MODEL
from tests.distributed.sources import SOURCE_LEN, with_sources
from tools.layouts_job import RouterMargins

ROWS, SEQ_LEN, VOCAB, SEED = 8, 48, 64, 3
Hook = Callable[[Engine, int], None]


def cut_batch(step: int, grid: Grid, accumulation: int) -> StepBatch:
    """This rank's part of step `step`, with the counts of all ranks: rows in two documents, some with few targets."""
    draw = torch.Generator().manual_seed(step)
    stream = torch.randint(0, VOCAB, (ROWS, SEQ_LEN + 1), generator=draw)
    stream[:, 1::2] = (stream[:, 0:-1:2] * 7 + 3) % VOCAB  # half of the text can be learned
    labels = stream[:, 1:].clone()
    labels[torch.rand(ROWS, SEQ_LEN, generator=draw) < torch.arange(ROWS)[:, None] / ROWS] = IGNORE
    rows, data = ROWS // (grid.rows.size * accumulation), grid.rows
    micro_batches = []
    for m in range(accumulation):
        mine = slice((m * data.size + data.rank) * rows, (m * data.size + data.rank + 1) * rows)
        starts = sorted({*range(0, rows * SEQ_LEN + 1, SEQ_LEN), *(r * SEQ_LEN + 17 for r in range(rows))})
        tokens = stream[mine, :-1].contiguous()
        inputs = TransformerInput(tokens, cu_seqlens=torch.tensor(starts, dtype=torch.int32))
        numbers = step * ROWS + np.arange(mine.start, mine.stop)
        where = Rows(np.zeros_like(numbers), numbers, numbers, np.zeros_like(numbers))
        micro_batches.append(Batch(inputs, {"lm": Targets(labels[mine].contiguous())}, rows=where))
    counts = LM.count([Batch(TransformerInput(stream[:, :-1]), {"lm": Targets(labels)})])
    return StepBatch(micro_batches, counts, step * ROWS, ROWS, 0.0)


def build(case: dict[str, Any], world: World) -> Engine:
    """The engine of a case; keys that it leaves out are the plain choice."""
    raw = {**TINY_MODEL, "vocab_size": VOCAB, "tie_embeddings": case.get("tied", False), **case.get("model", {})}
    args = ModelArgs.model_validate(raw)
    stage, precision, accumulation = case.get("stage", 1), case.get("precision", "fp32"), case.get("accumulation", 1)
    keys = ("tensor", "expert", "pipeline", "pipeline_schedule", "sequence_parallel")
    cut = {key: case[key] for key in keys if key in case}
    grid = make_grid(world, Layout(world.size, zero_stage=stage, **cut))
    lengths = {"seq_len": SEQ_LEN, "source_len": SOURCE_LEN if args.encoder_layers else None}
    table = ParameterTable.of(args).frozen(case.get("freeze", ()))
    table = table if args.lora is None else table.adapters_alone(args.lora.base == "int8")
    replica = build_replica(args, SEED, grid, zero_stage=stage, precision=precision, table=table, **lengths)
    replica.model.activation_checkpointing = case.get("recompute", "none")
    optim = OptimConfig.model_validate({"name": case.get("optimizer", "adamw"), "lr": 1e-3, "min_lr": 0.0})
    engine = Engine(
        replica,
        make_optimizer(replica.model, optim, table),
        objectives=LM,
        precision=precision,
        micro_batch_size=ROWS // (grid.rows.size * accumulation),
        max_accumulation=accumulation,
        clip_norm=0.5,
        seed=SEED,
        zero_stage=stage,
        offload_optimizer=case.get("offload", False),
        ema_decay=case.get("ema_decay"),
    )
    if case.get("compile"):
        compile_blocks(replica.model)
    return engine


def train(engine: Engine, case: dict[str, Any], steps: range) -> list[dict[str, Any]]:
    """The steps' numbers; in a job of one process also how close the routers came to another choice."""
    rows = []
    margins = RouterMargins(engine.model) if engine.world.size == 1 and not case.get("compile") else None
    for step in steps:
        batch = cut_batch(step, engine.grid, case.get("accumulation", 1))
        if engine.model.args.encoder_layers:
            batch = with_sources(batch, case.get("packed", True))
        result = engine.step(batch, batch.counts, lr=1e-3)
        rows.append(
            {
                "loss": result.loss,
                "grad_norm": result.grad_norm,
                "checksum": result.routing_checksum,
                "overflow": result.moe_overflow,
                "skipped": result.skipped,
                "margin": margins.take() if margins else None,
            }
        )
    return rows


def main() -> None:
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    process.quiet_libraries()
    world = process.start(60, 1)
    results = []
    for case in cases:
        first = case.get("first", 0)
        results.append(train(build(case, world), case, range(first, first + case.get("steps", 12))))
    if world.is_main:
        out.write_text(json.dumps(results))


if __name__ == "__main__":
    process.run(main)
