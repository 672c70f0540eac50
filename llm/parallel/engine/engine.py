"""One training step on DeepSpeed: micro-batches in, losses and gradient norm out, the same numbers on every layout.

The loss of a step is the sum of its objectives (llm/objectives.py), each a sum over the *global* batch divided by N,
its count there. DeepSpeed averages gradients over data-parallel ranks, so each micro-batch hands it its own sum times
their number / N: whatever the cut, every target weighs 1/N.

A step is applied whole or not at all. The global loss is known before the last backward; where it is not finite, or
above the limit given, that backward is made non-finite, and DeepSpeed drops a step with such gradients on all ranks:
one mechanism for every reason, without waiting for the device.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from llm.batch import Counts
from llm.data.batch import StepBatch
from llm.objectives import Objectives
from llm.parallel.collectives import agreed_error, gather_json
from llm.parallel.engine import deepspeed_private as private
from llm.parallel.engine.culprits import GradientProbes, Rehearsal, find_culprits
from llm.parallel.engine.options import deepspeed_config, with_extra
from llm.parallel.engine.pipeline import Pipelined
from llm.parallel.engine.schedule import Plain, Schedule
from llm.parallel.engine.state import TrainState
from llm.parallel.engine.step import Overflows, Skipped, Step, StepResult, Tally
from llm.parallel.muon import Muon
from llm.parallel.precision import check_precision
from llm.parallel.replica import Replica


class Engine:
    """A replica and its optimizer: DeepSpeed around a model that was built for the same ZeRO stage.

    `optimizer` is a torch optimizer over groups of the model's parameters, each with `lr_factor` beside torch's own
    keys; DeepSpeed replaces its parameters by flat float32 partitions. In bf16 and fp16 the masters are drawn anew in
    float32, because DeepSpeed would otherwise start from the rounded parameters.
    """

    def __init__(
        self,
        replica: Replica,
        optimizer: torch.optim.Optimizer,
        *,
        objectives: Objectives,
        precision: str,
        micro_batch_size: int,
        max_accumulation: int,
        clip_norm: float,
        seed: int,
        zero_stage: int = 1,
        offload_optimizer: bool = False,
        ema_decay: float | None = None,
        extra_config: dict[str, Any] | None = None,
    ) -> None:
        """max_accumulation: most micro-batches of a step. Raises UserError where this device has no arithmetic for
        `precision`.
        """
        self.replica = replica
        self.grid, self.world, self.model = grid, world, model = replica.grid, replica.world, replica.model
        self.objectives = objectives
        self.precision = precision
        self._seed = seed
        if precision == "fp32" and zero_stage == 1 and world.size == 1 and not offload_optimizer:
            zero_stage = 0  # nothing to cut: masters beside the parameters, and copies of gradients, would only cost
        self.zero_stage = zero_stage
        config = deepspeed_config(precision, zero_stage, offload_optimizer, clip_norm, grid.expert.size > 1)
        config["train_micro_batch_size_per_gpu"] = micro_batch_size
        config["gradient_accumulation_steps"] = max_accumulation  # sizes its buffers; a step says which is the last
        check_precision(precision)
        name_of = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = optimizer.param_groups
        members = [(group, name_of[id(p)]) for group in groups for p in group["params"] if id(p) in name_of]
        config = with_extra(config, extra_config or {})
        self.schedule: Schedule = (
            Pipelined(replica, optimizer, config)
            if grid.pipeline.size > 1
            else Plain(replica, optimizer, config, zero_stage=zero_stage, clip_norm=clip_norm)
        )
        self._deepspeed = self.schedule.deepspeed
        private.grow_loss_scale_late(self._deepspeed)
        if world.size == 1:
            private.skip_reduction(self._deepspeed)
        self._refuse_unequal_parts()
        self.state = TrainState(
            self._deepspeed,
            replica,
            zero_stage=zero_stage,
            seed=None if precision == "fp32" else seed,
            ema_decay=ema_decay,
            without_update={name for group, name in members if group["lr_factor"] == 0},
            of_muon={name for group, name in members if group.get("muon")},
        )
        if isinstance(optimizer, Muon):
            names = private.names_by_partition(self._deepspeed, model)
            held = (self.state.table, self.state.boxes, self.state.owned_ranges)
            optimizer.describe(self.state.partitions, names, *held, grid if zero_stage else None)
        if precision != "fp32":
            self._publish()
        self._overflows = Overflows()
        self.before_change: Callable[[], object] = _nothing
        """Called each time before masters, optimizer state or averages change."""

    def _refuse_unequal_parts(self) -> None:
        parts = len(private.partitions(self._deepspeed))
        if self.zero_stage == 3 and len(set(gather_json(parts, self.world))) > 1:  # it would wait for ever
            tensor = self.grid.tensor.size
            raise agreed_error(
                f"model.vocab_size={self.model.args.vocab_size}: parallel.tensor={tensor} leaves ranks so unequal "
                f"parts that ZeRO-3 cuts them differently; use a multiple of {tensor}, or zero_stage=2"
            )

    def _publish(self) -> None:
        """Make the masters the weights of the next forward (collective)."""
        private.publish_masters(self._deepspeed)
        self.schedule.publish()

    @property
    def gradient_scale(self) -> float:
        """How many times the gradient of a rank's micro-batch is larger than its part of the global gradient."""
        return self.grid.reduce.size * private.loss_scaler_state(self._deepspeed).get("cur_scale", 1.0)

    def step(
        self, batch: StepBatch, counts: Counts, lr: float, loss_limit: float | None = None, number: int = 0
    ) -> StepResult:
        """Forward and backward over this rank's micro-batches, one optimizer step at learning rate `lr` (collective).

        counts: of the global batch. loss_limit: no update where the loss is above it. number: of the step, which
        dropout goes by. Every group steps at its own `lr_factor` times lr.
        """
        for group in private.base_optimizer(self._deepspeed).param_groups:
            group["lr"] = lr * group["lr_factor"]
        tally = Tally(self.model.args, self.objectives, counts, self.world)
        key = (self._seed, number) if self.model.args.drops else None
        made = Step(batch, self.objectives, tally, self.grid, loss_limit, self.before_change, key)
        self.model.train()
        scaler, at_lowest = private.loss_scaler_state(self._deepspeed), private.loss_scale_is_lowest(self._deepspeed)
        norm = self.schedule.run(made)
        result = tally.result(norm, self.grid.expert.size)
        result.loss_scale = private.loss_scaler_state(self._deepspeed).get("cur_scale")
        if math.isfinite(norm):
            if tally.counts is not None:
                self.replica.set_expert_counts(tally.counts)
            self.replica.move_thresholds(result.routes)
            self.state.averages.update()
            self._overflows.applied()
        else:
            result.skipped = self._why_skipped(result.loss, loss_limit, at_lowest)
            if result.skipped in ("loss", "gradient"):
                broken = self._broken_stages(made, scaler) if result.skipped == "gradient" else []
                result.culprits = find_culprits(self.replica, batch, made.losses, broken)
        return result

    def _broken_stages(self, step: Step, scaler: dict[str, float]) -> list[int]:
        """This rank's stages in which a gradient of a step is not finite: it is computed again, with the loss scaler
        that it had (collective).
        """
        kept = private.loss_scaler_state(self._deepspeed)
        private.set_loss_scaler_state(self._deepspeed, scaler)
        tally = Tally(self.model.args, self.objectives, step.tally.step_counts, self.world)
        probes = GradientProbes(self.replica)
        again = Rehearsal(
            batch=step.batch,
            objectives=self.objectives,
            tally=tally,
            grid=self.grid,
            before_change=step.before_change,
            dropout_key=step.dropout_key,
            probes=probes,
        )
        self.schedule.rehearse(again)
        private.set_loss_scaler_state(self._deepspeed, kept)
        return probes.broken()

    def _why_skipped(self, loss: float, loss_limit: float | None, at_lowest: bool) -> Skipped:
        if not math.isfinite(loss):
            return "loss"
        if loss_limit is not None and loss > loss_limit:
            return "limit"
        return self._overflows.why(at_lowest) if self.precision == "fp16" else "gradient"

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside, the model computes with the moving average of its weights (collective); needs ema_decay."""
        self._swap_averages()
        try:
            yield
        finally:
            self._swap_averages()

    def _swap_averages(self) -> None:
        self.before_change()
        self.state.averages.swap()
        self._publish()

    def prepare_load(self, kinds: dict[str, set[str]], scalars: dict[str, float]) -> None:
        """Make room for what a checkpoint has: see `TrainState.prepare_load`."""
        self.before_change()
        self.state.prepare_load(kinds, scalars)

    def finish_load(self) -> None:
        """Make the loaded masters the weights of the next forward (collective)."""
        self._publish()


def _nothing() -> None:
    return None
