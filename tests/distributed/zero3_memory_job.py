"""Run under torchrun: peak memory of each rank while a ZeRO-3 model and its optimizer masters come into being."""

import json
import sys
from pathlib import Path

from llm.args import ModelArgs
from llm.parallel.collectives import gather_json
from llm.parallel.engine import deepspeed_private as private
from llm.parallel.engine.build import build_replica
from llm.parallel.engine.engine import Engine
from llm.parallel.grid import make_grid
from llm.parallel.launch import process
from llm.train.config import OptimConfig
from llm.train.optimizer import make_optimizer
from tests.data.helpers import LM

MODEL = {"dim": 1024, "n_layers": 8, "n_heads": 8, "n_kv_heads": 8, "ffn_hidden": 2816, "vocab_size": 8192}
SMALL = {**MODEL, "dim": 64, "ffn_hidden": 64, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2}


def memory(field: str) -> int:
    """A line of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def main() -> None:
    process.quiet_libraries()
    world = process.start(60, 1)
    grid = make_grid(world)

    def build(shape: dict[str, int]) -> Engine:
        args = ModelArgs.model_validate(shape)
        replica = build_replica(args, 0, grid, zero_stage=3, precision="bf16")
        return Engine(
            replica,
            make_optimizer(replica.model, OptimConfig()),
            objectives=LM,
            precision="bf16",
            micro_batch_size=1,
            max_accumulation=1,
            clip_norm=1.0,
            seed=0,
            zero_stage=3,
        )

    build(SMALL)  # what any model costs: libraries, buffers of the process group
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    engine = build(MODEL)
    grown = memory("VmHWM") - before
    owned = sum(held.length for held in private.owned_ranges(engine._deepspeed, engine.model))
    rows = gather_json([grown, owned, engine.state.n_parameters], world)
    if world.is_main:
        Path(sys.argv[1]).write_text(json.dumps(rows))


if __name__ == "__main__":
    process.run(main)
