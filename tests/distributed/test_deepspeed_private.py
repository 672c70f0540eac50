"""The private attributes of DeepSpeed that llm/parallel/engine/deepspeed_private.py reads: this fails by name when one
moves.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import TINY_MODEL
from tests.distributed.pool import run_job
from tests.machine import needs

pytestmark = pytest.mark.distributed

CASES = ((1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "fp32"), (3, "bf16"))
GROWING = ((1, "fp16"), (2, "fp16"), (3, "fp16"))
REPORT_KEYS = ("covered", "state_covered", "master_is_exact", "scalars", "kinds", "norm", "class")


def main() -> None:
    """Run by tests/distributed/pool.py: what each function of the private module gives, for both precisions."""
    import torch

    from llm.args import ModelArgs
    from llm.batch import Batch, Targets
    from llm.data.batch import StepBatch
    from llm.datatypes import TransformerInput
    from llm.parallel.collectives import gather_json
    from llm.parallel.engine import deepspeed_private as private
    from llm.parallel.engine.build import build_replica
    from llm.parallel.engine.engine import Engine
    from llm.parallel.grid import make_grid
    from llm.parallel.launch import process
    from llm.parallel.precision import has_arithmetic
    from llm.parameters import ParameterTable
    from llm.train.config import OptimConfig
    from llm.train.optimizer import make_optimizer
    from tests.data.helpers import LM

    out = Path(sys.argv[1])
    process.quiet_libraries()
    world = process.start(60, 1)
    grid = make_grid(world)
    args = ModelArgs.model_validate({**TINY_MODEL, "vocab_size": 64})
    table = ParameterTable.of(args)
    report: dict[str, Any] = {}
    for stage, precision in CASES + GROWING:
        if not has_arithmetic(precision):
            continue
        replica = build_replica(args, 3, grid, zero_stage=stage, precision=precision)
        engine = Engine(
            replica,
            make_optimizer(replica.model, OptimConfig()),
            objectives=LM,
            precision=precision,
            micro_batch_size=1,
            max_accumulation=1,
            clip_norm=1.0,
            seed=3,
            zero_stage=stage,
        )
        exact = all(
            torch.equal(f.values, table[f.name].init.values(3, f.name, f.start, f.start + f.values.numel()))
            for f in engine.state.owned_fragments()
        )
        before = None
        if precision == "fp16":
            # so that it grows in this step
            private.set_loss_scaler_state(engine._deepspeed, {"scale_window": 1, "cur_iter": 1})
            before = engine._deepspeed.optimizer.loss_scaler.cur_scale
        tokens = torch.arange(16).view(1, 16) + 16 * world.rank
        micro_batch = Batch(TransformerInput(tokens), {"lm": Targets(tokens + 1)})
        counts = LM.count([micro_batch] * world.size)
        result = engine.step(StepBatch([micro_batch], counts, 0, world.size, 0.0), counts, lr=1e-3)
        if before is not None:
            grown = engine._deepspeed.optimizer.loss_scaler.cur_scale / before
            report[f"{stage} {precision}"] = {"grown": grown, "norm": result.grad_norm}
            continue
        mine = [[f.name, f.kind, f.start, f.values.numel()] for f in engine.state.owned_fragments()]
        everything = [row for rows in gather_json(mine, world) for row in rows]
        numel = {name: math.prod(shape) for name, shape in engine.state.shapes.items()}

        def covers(kind: str, everything: list[Any] = everything, numel: dict[str, int] = numel) -> bool:
            return all(
                sum(n for name, k, _, n in everything if (name, k) == (p, kind)) == size for p, size in numel.items()
            )

        report[f"{stage} {precision}"] = {
            "covered": covers("master"),
            "state_covered": covers("exp_avg") and covers("exp_avg_sq"),
            "master_is_exact": all(gather_json(exact, world)),
            "scalars": private.optimizer_scalars(engine._deepspeed),
            "kinds": sorted({kind for _, kind, _, _ in everything}),
            "norm": result.grad_norm,
            "class": type(engine._deepspeed.optimizer).__name__,
        }
    import deepspeed

    report["compiles nothing"] = deepspeed.comm.comm.cdb.shm_comm_op is None
    if world.is_main:
        out.write_text(json.dumps(report))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("private") / "report.json"
    done = run_job("tests/distributed/test_deepspeed_private.py", str(out), nproc=2)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(out.read_text()))


@pytest.mark.parametrize("case", [f"{stage} {precision}" for stage, precision in CASES])
def test_each_rank_knows_its_masters_and_states(report: dict[str, Any], case: str) -> None:
    needs(case.split()[1])
    found = report[case]
    assert sorted(found) == sorted(REPORT_KEYS)
    assert found["covered"], "the owned ranges no longer cover every parameter once"
    assert found["state_covered"], "the base optimizer's state no longer lines up with the partitions"
    assert found["kinds"] == ["exp_avg", "exp_avg_sq", "master"]
    assert found["scalars"] == {"step": 1.0}
    assert found["master_is_exact"], "masters must start from the unrounded initial values"
    # bf16 has 8 bits of mantissa: 2^-8 per rounding, a few of them in a row
    assert found["norm"] == pytest.approx(report["1 fp32"]["norm"], rel=0.02)


@pytest.mark.parametrize("case", [f"{stage} {precision}" for stage, precision in GROWING])
def test_the_loss_scale_grows_after_the_gradients_were_divided_by_it(report: dict[str, Any], case: str) -> None:
    needs(case.split()[1])
    assert report[case]["grown"] == 2.0
    assert report[case]["norm"] == pytest.approx(report["1 fp32"]["norm"], rel=0.005)  # fp16 has 11 bits of mantissa


def test_the_classes_are_the_known_ones_and_nothing_is_compiled(report: dict[str, Any]) -> None:
    needs("bf16")
    classes = {case: report[case]["class"] for case in ("1 fp32", "1 bf16", "3 fp32")}
    assert list(classes.values()) == ["DeepSpeedZeroOptimizer", "BF16_Optimizer", "DeepSpeedZeroOptimizer_Stage3"]
    assert report["compiles nothing"]


def test_below_zero_2_gradients_are_reduced_after_the_backward_alone() -> None:
    """`before_reduction` counts on it."""
    import inspect

    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    assert "self.allreduce_gradients()" in inspect.getsource(DeepSpeedEngine._backward_epilogue)
    in_hooks = inspect.getsource(DeepSpeedZeroOptimizer.process_gradients)
    assert "if self.partition_gradients or self.overlap_comm:" in in_hooks


def test_parameters_marked_as_frozen_are_not_sent_around_before_training() -> None:
    import inspect

    from deepspeed.runtime.engine import DeepSpeedEngine

    assert "hasattr(p, 'ds_optim_param')" in inspect.getsource(DeepSpeedEngine._broadcast_model)
