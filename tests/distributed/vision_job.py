"""Run under torchrun: engines of a tiny model with a vision tower, one short training per case, all in one job to save
start-up time. Rows are a function of the step: some have images, some have none, and in each step of two data-parallel
ranks one has text alone.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

from llm.args.lora import TOWER
from llm.batch import Batch
from llm.data.batch import StepBatch
from llm.datatypes import TransformerInput
from llm.parallel.engine.engine import Engine
from llm.parallel.grid import Grid, make_grid
from llm.parallel.launch import process
from llm.parallel.launch.world import World
from llm.train.config import RunConfig, check_layout, validate
from llm.train.run import build_engine
from tests.data.helpers import LM
from tests.distributed.engine_job import ROWS, SEQ_LEN, VOCAB
from tests.distributed.engine_job import cut_batch as text_batch
from tests.distributed.harness import TINY_MODEL, tiny_config

PATCH, SIDE, SLOTS = VOCAB, 8, 4
VISION: dict[str, Any] = {
    "image_size": SIDE, "patch_size": 2, "dim": 16, "n_layers": 2, "n_heads": 2, "output_dim": 16,
    "patch_token_id": PATCH,
}  # fmt: skip
MODEL = {**TINY_MODEL, "vocab_size": VOCAB + 1, "init_std": 0.1, "vision": VISION}
TILES = ([3, 1, 0, 0, 0, 1, 0, 0], [1, 0, 3, 1, 0, 0, 0, 0])
"""Of each row, in even and in odd steps: of two ranks the second has text alone, in even ones with two micro-batches,
in odd ones with one."""


def cut_batch(step: int, grid: Grid, accumulation: int, kind: str = "tiles") -> StepBatch:
    """This rank's part of a step: rows of text, in which images of random levels stand, as a tower of this kind takes
    them."""
    cut, tiles = text_batch(step, grid, accumulation), TILES[step % 2]
    draw = torch.Generator().manual_seed(1000 + step)
    levels = torch.randint(0, 256, (ROWS, max(tiles), 3, SIDE, SIDE), generator=draw, dtype=torch.uint8)
    micro_batches = []
    for batch in cut.micro_batches:
        assert batch.rows is not None
        numbers = [int(row) % ROWS for row in batch.rows.global_row]
        tokens = batch.inputs.tokens.clone()
        for place, number in enumerate(numbers):
            for image in range(tiles[number]):  # one after the other, from the second document on
                tokens[place, 20 + 7 * image : 20 + 7 * image + SLOTS] = PATCH
        found = torch.cat([levels[number, : tiles[number]] for number in numbers])
        images = None if not len(found) else found if kind == "tiles" else list(found)
        inputs = TransformerInput(tokens, cu_seqlens=batch.inputs.cu_seqlens, images=images)
        micro_batches.append(Batch(inputs, batch.targets, rows=batch.rows))
    return StepBatch(micro_batches, cut.counts, cut.first_row, cut.n_rows, 0.0)


def config_of(case: dict[str, Any]) -> RunConfig:
    """The config of a case: sections of it over those of a plain run."""
    named = ("parallel", "optim", "train", "deepspeed", "lora")
    sections = {name: dict(case[name]) for name in named if name in case}
    train = {"seq_len": SEQ_LEN, "global_batch_size": ROWS, "micro_batch_size": 4, "precision": "fp32"}
    sections["train"] = train | sections.get("train", {})
    sections["optim"] = {"lr": 1e-3, "warmup_steps": 1, "clip_norm": 0.5} | sections.get("optim", {})
    raw = tiny_config(Path("unused"), **sections)
    raw["model"] = {**MODEL, **case.get("model", {})}
    return validate(raw, "case")


def build(case: dict[str, Any], world: World) -> tuple[Engine, int]:
    """The engine of a case, and its micro-batches of a step."""
    config = config_of(case)
    grid = make_grid(world, check_layout(config, world.size))
    return build_engine(config, grid), ROWS // (config.train.micro_batch_size * grid.rows.size)


def held_out_loss(engine: Engine, batch: StepBatch) -> float:
    """What scoring says of the rows that a step would train on."""
    (sums,) = engine.replica.sum_losses([engine.objectives.main], iter(batch.micro_batches), [lambda _: [0.0]])
    return sums.total


def train(case: dict[str, Any], world: World) -> list[dict[str, Any]]:
    engine, accumulation = build(case, world)
    rows = []
    for step in range(case.get("steps", 4)):
        batch = cut_batch(step, engine.grid, accumulation, engine.model.args.vision.kind)
        scored = held_out_loss(engine, batch)
        result = engine.step(batch, batch.counts, lr=1e-3, number=step + 1)
        rows.append(
            {
                "loss": result.loss,
                "grad_norm": result.grad_norm,
                "checksum": result.routing_checksum,
                "skipped": result.skipped,
                "scored": scored / batch.counts.main,
            }
        )
    if case.get("kept"):
        rows[-1]["kept"] = tower_calls(engine, accumulation)
    return rows


def tower_calls(engine: Engine, accumulation: int) -> dict[str, float]:
    """Of a forward with images: whether the tower's result has a graph behind it, and the most it keeps of it."""
    model, seen = engine.model, []
    tower = getattr(model, TOWER, None)
    if tower is None:
        return {}
    hook = tower.register_forward_hook(lambda _, __, out: seen.append(out.requires_grad))
    batch = next(b for b in cut_batch(0, engine.grid, accumulation).micro_batches if b.inputs.images is not None)
    here = engine.replica.to_device(batch)
    kept: list[int] = []

    def count(x: torch.Tensor) -> torch.Tensor:
        kept.append(math.prod(x.shape))
        return x

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        model(here.inputs, losses=LM.losses_of(model, here))
    hook.remove()
    return {"graph": float(any(seen)), "numbers": float(sum(kept))}


def main() -> None:
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    process.quiet_libraries()
    world = process.start(60, 1)
    results = [train(case, world) for case in cases]
    if world.is_main:
        out.write_text(json.dumps(results))


if __name__ == "__main__":
    process.run(main)
