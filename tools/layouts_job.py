"""Run under torchrun by tools/layouts.py: the first steps of a run on several layouts of the same ranks, one after the
other.

Arguments: a JSON list of run configs that differ in nothing but `parallel`, `train.micro_batch_size`, precision and
what saves memory; the number of steps; and the file that gets one line of JSON a layout, as soon as it is done.
"""

import gc
import json
import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn

from llm.data.loader import TrainLoader
from llm.data.mixture import Mixture
from llm.model import LLM
from llm.parallel.collectives import all_or_none, sum_over_ranks
from llm.parallel.grid import Grid, make_grid
from llm.parallel.launch import process
from llm.train.chat import run_tokenizer
from llm.train.config import RunConfig, check_layout, validate
from llm.train.run import build_engine
from llm.train.settle import rows_wanted, settle_model, task_in, with_vocabulary


class RouterMargins:
    """How close a model's routers come to another choice: the distance between the last chosen and the first unchosen
    logit of a token, relative to the largest logit of its layer; the smallest over all tokens and layers.

    Rounding moves logits by about 1e-7 of that largest one. Nearer than that, a choice is anybody's.
    """

    def __init__(self, model: LLM) -> None:
        self._smallest = math.inf
        for moe in model.moe_layers():
            if moe.moe.top_k < moe.moe.n_experts:
                moe.router.register_forward_hook(partial(self._look, moe.moe.top_k))

    def _look(self, top_k: int, _: nn.Module, __: Any, logits_NE: Tensor) -> None:
        best = logits_NE.detach().topk(top_k + 1, dim=-1).values
        margin = (best[:, -2] - best[:, -1]).min() / logits_NE.detach().abs().max()
        self._smallest = min(self._smallest, float(margin))

    def take(self) -> float | None:
        """The smallest since the last call; None without a choice."""
        smallest, self._smallest = self._smallest, math.inf
        return smallest if math.isfinite(smallest) else None


def train(config: RunConfig, mixture: Mixture, grid: Grid, steps: int) -> list[dict[str, Any]]:
    """The numbers of the steps, at the peak learning rate: a warm-up would hide a wrong update.

    Margins are known where one rank sees the whole batch, and nothing is compiled.
    """
    settings, data = config.train, grid.rows
    engine = build_engine(config, grid)
    margins = RouterMargins(engine.model) if grid.world.size == 1 and not settings.compile else None
    loader = TrainLoader(
        mixture,
        seq_len=settings.seq_len,
        global_batch_size=settings.global_batch_size,
        micro_batch_size=settings.micro_batch_size,
        dp_rank=data.rank,
        dp_size=data.size,
        count=partial(engine.objectives.count, sources=mixture.names),
        batch_schedule=settings.batch_schedule,
        seq_len_schedule=settings.seq_len_schedule,
    )
    rows = []
    with loader:
        for step in range(1, steps + 1):
            batch = all_or_none(loader.next, grid.world)
            mine = [count * grid.reports_loss for count in batch.counts.values()]
            counts = batch.counts.with_values(sum_over_ranks(mine, grid.world))
            result = engine.step(batch, counts, config.optim.lr, number=step)
            rows.append(
                {
                    "loss": result.loss,
                    "grad_norm": result.grad_norm,
                    "routing_checksum": result.routing_checksum,
                    "targets": counts.targets,
                    "margin": margins.take() if margins else None,
                    "skipped": result.skipped,
                }
            )
    return rows


def main() -> None:
    configs = [validate(raw, sys.argv[1]) for raw in json.loads(Path(sys.argv[1]).read_text())]
    steps, out = int(sys.argv[2]), Path(sys.argv[3])
    first = configs[0]
    process.quiet_libraries()
    world = process.start(first.parallel.timeout_s, first.train.threads)
    tokenizer, _ = all_or_none(lambda: run_tokenizer(first), world)
    task = task_in(first)
    opened = task.open_rows(rows_wanted(first), tokenizer, world)
    grids: dict[tuple[int, ...], Grid] = {}  # groups take time and memory, and the ZeRO stages can share them
    for config in configs:
        layout = check_layout(config, world.size)
        cut = (layout.tensor, layout.pipeline, layout.expert)
        if cut not in grids:
            grids[cut] = make_grid(world, layout)
        settled = settle_model(with_vocabulary(config, tokenizer), task, opened, goes_on=False)
        rows = train(settled, opened.train, replace(grids[cut], layout=layout), steps)
        gc.collect()  # the last engine, which refers to itself
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if world.is_main:
            with out.open("a") as file:
                file.write(json.dumps(rows) + "\n")


if __name__ == "__main__":
    process.run(main)
