"""Run under torchrun: runs of the tiny model in which one rank's loss or gradient is spoiled on chosen rows, and runs
that pass over the step of these rows.
"""

import math
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from llm.errors import UserError
from llm.model import LLM
from llm.parallel.engine.engine import Engine
from llm.parallel.launch import process
from llm.train.config import validate
from llm.train.trainer import Trainer

BAD_STEP = 10  # from 1, behind the window of the spike detector
CASES: dict[str, dict[str, Any]] = {
    "skipped": {"train": {"skip_steps": [BAD_STEP]}},
    "loss-skip": {"spoil": "loss", "guard": {"nonfinite": "skip"}},
    "gradient-skip": {"spoil": "gradient", "guard": {"nonfinite": "skip"}},
    "loss-rewind": {"spoil": "loss", "guard": {"nonfinite": "rewind"}},
    "gradient-rewind": {"spoil": "gradient", "guard": {"nonfinite": "rewind"}},
    "spike-skip": {"spoil": "spike", "guard": {"spike": "skip", "spike_window": 8, "spike_threshold": 50.0}},
    "loss-raise": {"spoil": "loss", "guard": {"nonfinite": "raise"}},
}
PIPELINE = 0  # not a stage of ZeRO here, but two stages of a pipeline
DUALPIPEV = -1  # the same with four stages, the last of which, with the loss, is on rank 0
STAGES = {1: "fp32", 2: "bf16", 3: "fp32", PIPELINE: "fp32", DUALPIPEV: "fp32"}
SPOILED = {DUALPIPEV: 0}
"""The rank that goes wrong, where it is not rank 1."""
OFFLOADED = 2  # the stage whose optimizer works in CPU memory


class _Spoil(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad.fill_(math.inf)


def spoil(engine: Engine, kind: str | None, rank: int) -> None:
    """Spoil the last micro-batch of BAD_STEP on one rank, whenever its rows come up."""
    step, context, loss_sum, embed, run = engine.step, LLM.context, LLM.loss_sum, LLM.embed, LLM.run
    tokens: list[torch.Tensor] = []  # of the micro-batch, while its step is made
    bad = False  # whether it is the one whose forward is being made

    def spoiled_step(batch: Any, *args: Any, **kwargs: Any) -> Any:
        if batch.first_row == (BAD_STEP - 1) * batch.n_rows and engine.world.rank == rank:
            tokens.append(batch.micro_batches[-1].inputs.tokens)
        result = step(batch, *args, **kwargs)
        tokens.clear()
        return result

    def watching_context(self: LLM, inputs: Any, *args: Any, **kwargs: Any) -> Any:  # once in every forward
        nonlocal bad
        bad = bool(tokens) and torch.equal(inputs.tokens, tokens[0])
        return context(self, inputs, *args, **kwargs)

    def spoiled_loss(self: LLM, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = loss_sum(self, *args, **kwargs)
        if bad:
            return loss * {"loss": math.nan, "spike": 10.0}.get(kind or "", 1.0)
        return loss

    def spoiled(x: torch.Tensor) -> torch.Tensor:
        return _Spoil.apply(x) if bad and kind == "gradient" else x  # type: ignore[no-any-return]

    def spoiled_run(self: LLM, units: Any, x: torch.Tensor | None, *args: Any) -> Any:
        return run(self, units, None if x is None else spoiled(x), *args)

    engine.step = spoiled_step  # type: ignore[method-assign]
    LLM.context, LLM.loss_sum = watching_context, spoiled_loss  # type: ignore[method-assign]
    LLM.embed = lambda *args: spoiled(embed(*args))  # type: ignore[method-assign]
    LLM.run = spoiled_run  # type: ignore[method-assign]


def main() -> None:
    config_path, out, stage = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    process.quiet_libraries()
    world = process.start(60, 1)
    plain = LLM.context, LLM.loss_sum, LLM.embed, LLM.run
    for name, case in CASES.items():
        raw = yaml.safe_load(config_path.read_text())
        raw["guard"] = case.get("guard", {})
        raw["train"].update(case.get("train", {}), precision=STAGES[stage])
        raw["parallel"].update(zero_stage=max(stage, 1), offload_optimizer=stage == OFFLOADED)
        raw["parallel"]["pipeline"] = 2 if stage in (PIPELINE, DUALPIPEV) else 1
        raw["parallel"]["pipeline_schedule"] = "dualpipev" if stage == DUALPIPEV else "1f1b"
        trainer = Trainer(validate(raw, str(config_path)), out / f"{stage}-{name}", world)
        spoil(trainer.run.engine, case.get("spoil"), rank=SPOILED.get(stage, 1))
        try:
            trainer.fit()
        except UserError as error:
            finite = all(bool(f.values.isfinite().all()) for f in trainer.run.engine.state.owned_fragments())
            (out / f"{stage}-{name}" / f"error{world.rank}.txt").write_text(f"{finite} {error}")
        LLM.context, LLM.loss_sum, LLM.embed, LLM.run = plain  # type: ignore[method-assign]


if __name__ == "__main__":
    process.run(main)
