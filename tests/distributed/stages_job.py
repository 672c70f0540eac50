"""Run under torchrun: one run carried through all ZeRO stages, and what the average of the weights is made of."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from llm.data.batch import StepBatch
from llm.parallel.collectives import gather_json
from llm.parallel.engine.engine import Engine
from llm.parallel.launch import process
from llm.parallel.launch.world import World
from llm.parallel.precision import has_arithmetic
from llm.train.config import validate
from llm.train.trainer import Trainer
from tests.distributed.engine_job import build, cut_batch

JOURNEYS: dict[str, list[tuple[int, int]]] = {  # (stage, steps)
    "adamw": [(1, 4), (3, 8), (2, 12), (0, 16)],
    "muon": [(0, 4), (2, 8), (3, 12), (1, 16)],
}
DECAY = 0.75


def values(engine: Engine, kind: str) -> dict[tuple[str, int], torch.Tensor]:
    return {(f.name, f.start): f.values.clone() for f in engine.state.owned_fragments() if f.kind == kind}


def loss_sum(engine: Engine, batch: StepBatch) -> float:
    (sums,) = engine.replica.sum_losses([engine.objectives.main], iter(batch.micro_batches), [lambda batch: []])
    return sums.total


def average_is_right(world: World) -> dict[str, bool]:
    """Whether the average follows its formula bit for bit, and lending it to the model leaves no trace."""
    case = {"stage": 3, "ema_decay": DECAY}
    engine = build(case, world)
    expected = values(engine, "master")
    for step in range(3):
        batch = cut_batch(step, engine.grid, 1)
        engine.step(batch, batch.counts, lr=1e-2)
        now = values(engine, "master")
        expected = {key: average.lerp(now[key], 1 - DECAY) for key, average in expected.items()}
    masters = values(engine, "master")
    batch = cut_batch(9, engine.grid, 1)
    own = loss_sum(engine, batch)
    with engine.averaged_weights():
        averaged = loss_sum(engine, batch)
    again = loss_sum(engine, batch)
    equal = [
        all(torch.equal(expected[key], value) for key, value in values(engine, "ema").items()),
        all(torch.equal(masters[key], value) for key, value in values(engine, "master").items()),
    ]
    formula, restored = (all(column) for column in zip(*gather_json(equal, world), strict=True))
    return {"formula": formula, "restored": restored and again == own, "lent": averaged != own}


def change_what_may_be_changed(raw: dict[str, Any], config_path: Path, run_dir: Path, world: World) -> None:
    """A run whose optimizer, precision and average change on the way, as checkpoint.allow_changes lets them: from fp16,
    whose loss scale must go, where the device has it, else from bf16.
    """
    half = next((precision for precision in ("fp16", "bf16") if has_arithmetic(precision)), None)
    for optimizer, precision, decay, steps in (("muon", half, None, 4), ("adamw", "fp32", DECAY, 8)) if half else ():
        raw["optim"].update(name=optimizer, ema_decay=decay)
        raw["train"].update(precision=precision, steps=steps)
        raw["parallel"]["zero_stage"] = 1
        raw["checkpoint"]["allow_changes"] = ["optim", "train.precision"]
        Trainer(validate(raw, str(config_path)), run_dir, world).fit()


def main() -> None:
    config_path, out = Path(sys.argv[1]), Path(sys.argv[2])
    raw: dict[str, Any] = yaml.safe_load(config_path.read_text())
    process.quiet_libraries()
    world = process.start(60, 1)
    for optimizer, journey in JOURNEYS.items():
        raw["optim"]["name"] = optimizer
        for name, legs in (("whole", [(1, 16)]), ("moved", journey)):
            for stage, steps in legs:
                raw["parallel"]["zero_stage"], raw["train"]["steps"] = stage, steps
                Trainer(validate(raw, str(config_path)), out / f"{optimizer}-{name}", world).fit()
    change_what_may_be_changed(raw, config_path, out / "changed", world)
    report = average_is_right(world)
    if world.is_main:
        (out / "average.json").write_text(json.dumps(report))


if __name__ == "__main__":
    process.run(main)
