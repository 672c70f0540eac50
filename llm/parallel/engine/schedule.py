"""How the micro-batches of a step go through the stages of a rank: what the engine asks of any schedule, and the
schedule of a rank that has the whole model.
"""

import math
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from llm.parallel.engine import deepspeed_private as private
from llm.parallel.engine.partial_gradients import PartialGradients
from llm.parallel.engine.step import Step
from llm.parallel.muon import Muon
from llm.parallel.replica import Replica


class Schedule(Protocol):
    """Owns DeepSpeed's engine, of the class that the schedule needs."""

    deepspeed: Any

    def run(self, step: Step) -> float:
        """Compute the step and apply it: its sums and losses are then those of all micro-batches. The norm of the
        gradients, inf where they were not applied (collective).
        """

    def rehearse(self, step: Step) -> None:
        """Compute a step whose `one_or_nan` is NaN, so that nothing is applied; all gradients of its micro-batches have
        been made when that is asked for (collective).
        """

    def publish(self) -> None:
        """Bring the weights that DeepSpeed has made of new masters to where else they are needed (collective)."""


class Plain:
    """One micro-batch after the other, forward and backward, on a rank that has the whole model."""

    def __init__(
        self,
        replica: Replica,
        optimizer: torch.optim.Optimizer,
        config: dict[str, Any],
        *,
        zero_stage: int,
        clip_norm: float,
    ) -> None:
        self._replica, self._zero_stage, self._clip_norm = replica, zero_stage, clip_norm
        self.deepspeed = private.initialize(replica.model, optimizer, config, replica.grid)
        private.before_reduction(self.deepspeed, PartialGradients(replica, self.deepspeed, zero_stage).sum)

    def run(self, step: Step) -> float:
        engine, replica = self.deepspeed, self._replica
        last = len(step.batch.micro_batches) - 1
        for m, micro_batch in enumerate(step.batch.micro_batches):
            engine.set_gradient_accumulation_boundary(m == last)
            here = step.with_keys(replica.to_device(micro_batch))
            losses = step.objectives.losses_of(replica.model, here)
            given = {"expert_counts": replica.expert_counts(), "keys_N": here.keys_N}
            loss = step.loss(engine(here.inputs, losses=losses, **given), here)
            assert loss is not None
            if m == last:
                step.tally.sum_over_ranks()
                loss = loss * step.one_or_nan()
            engine.backward(loss, scale_wrt_gas=False)
            if m < last:
                engine.step()  # updates nothing yet: DeepSpeed wants it after each backward
        step.before_change()
        if not self._zero_stage:
            return self._apply_whole()
        engine.step()
        return private.end_step(engine)

    def rehearse(self, step: Step) -> None:
        # what one_or_nan spoils is the last micro-batch, so that comes once more
        micro_batches = [*step.batch.micro_batches, step.batch.micro_batches[-1]]
        self.run(replace(step, batch=replace(step.batch, micro_batches=micro_batches)))

    def publish(self) -> None:
        pass  # nobody else has these weights

    def _apply_whole(self) -> float:
        """Clip and step on one rank without ZeRO, which does that by itself."""
        engine = self.deepspeed
        parameters = list(self._replica.model.parameters())
        norm = total_norm([p.grad for p in parameters if p.grad is not None])
        if not norm.isfinite():
            engine.zero_grad()
            return math.inf
        base = private.base_optimizer(engine)
        is_adamw = isinstance(base, torch.optim.AdamW) and not isinstance(base, Muon)
        if self._clip_norm and is_adamw and base.defaults["fused"]:
            # divides in the same pass over memory as the update, where clipping would be one more
            base.grad_scale = (norm / self._clip_norm).clamp(min=1).float()  # type: ignore[attr-defined]
        elif self._clip_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, self._clip_norm, norm.float())
        engine.step()
        return float(norm)


def total_norm(grads: list[Tensor]) -> Tensor:
    """2-norm of all elements, float64: row by row, as a CPU adds up a whole tensor in one long float32 sum, which is
    wrong by 8e-4 at 16 million elements."""
    rows = (torch.linalg.vector_norm(grad, dim=-1) for grad in grads)
    return torch.stack([torch.linalg.vector_norm(row, dtype=torch.float64) for row in rows]).norm()
