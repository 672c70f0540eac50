"""The schedule of one rank of a pipeline, on DeepSpeed's pipeline engine.

A stage's forwards come in their order, so its next forward is of the next micro-batch.

The last stage alone has the loss. The router's losses of the stages before it are part of no tensor that is sent: the
stage's result passes through an autograd node that gives them their gradient. All stages know the global loss only
after their last backward; what makes a bad step's last gradient non-finite elsewhere is done then, to a gradient that
is already there, so that the same check drops the step on all ranks.

Tied embeddings belong to the first stage. The last one, where another rank has it, has a copy that no optimizer knows:
before gradients are summed over data-parallel ranks it sends its gradient, and after the update it gets the new
weights. So there is one master, clipped and counted once, and nothing that could drift apart.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llm.batch import Batch
from llm.model import EMBEDDING
from llm.parallel.engine import deepspeed_pipeline as pipe
from llm.parallel.engine import deepspeed_private as private
from llm.parallel.engine.partial_gradients import PartialGradients
from llm.parallel.engine.step import Step
from llm.parallel.replica import Replica


class Pipelined:
    """The order of DeepSpeed's pipeline (one forward, one backward in turn; DualPipeV) through a rank's stages."""

    _step: Step

    def __init__(self, replica: Replica, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> None:
        layout, ranks = replica.grid.layout, replica.grid.pipeline.ranks
        self._replica = replica
        self._queues: list[deque[Batch]] = [deque() for _ in replica.stages]
        self._shapes: list[tuple[int, ...]] = []
        hooks = (self._next_forward, self._before_reduction)
        self.deepspeed = pipe.initialize(replica, *hooks, optimizer, config)
        ends = [ranks[layout.holder(stage)] for stage in (0, layout.stages - 1)]
        self._partial = PartialGradients(replica, self.deepspeed, zero_stage=1)
        trains = any(row.trainable for name, row in replica.table.items() if name.startswith(f"{EMBEDDING}."))
        self.tied = TiedTable(self.deepspeed, replica, *ends) if replica.model.args.tie_embeddings and trains else None

    def run(self, step: Step) -> float:
        self._step = step
        pipe.train(self.deepspeed, self._feed(step.batch.micro_batches), len(step.batch.micro_batches))
        norm = private.end_step(self.deepspeed)
        if math.isfinite(norm):
            self.publish()
        return norm

    def rehearse(self, step: Step) -> None:
        self.run(step)

    def publish(self) -> None:
        if self.tied:
            self.tied.send_weight()

    def _feed(self, micro_batches: list[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
        """The micro-batches for DeepSpeed, and for this rank's forwards."""
        self._queues = [deque(micro_batches) for _ in self._replica.stages]
        inputs = micro_batches[0].inputs
        shapes = [tuple(side.tokens.shape) for side in (inputs, inputs.source) if side is not None]
        if shapes != self._shapes:
            pipe.forget_shape(self.deepspeed)
            self._shapes = shapes
        return ((batch.inputs.tokens, batch.inputs.tokens) for batch in micro_batches)

    def _next_forward(self, x: Tensor, phase: int) -> Tensor:
        """A stage of its next micro-batch: what the next stage takes, or the loss."""
        replica, batch, stage = self._replica, self._queues[phase].popleft(), self._replica.stages[phase]
        before = None if stage.first else x  # DeepSpeed has token ids there, without gradient
        here = self._step.with_keys(replica.to_device(batch))
        losses = self._step.objectives.losses_of(replica.model, here) if stage.last else None
        out = replica.through_stage(phase, before, here.inputs, losses, keys_N=here.keys_N)
        loss = self._step.loss(out, here, replica.moe_layers[phase].start)
        if stage.last:
            assert loss is not None
            return loss * self.deepspeed.gradient_accumulation_steps()  # by which DeepSpeed divides it
        assert out.hidden is not None
        if not out.hidden.requires_grad:  # nothing trains up to here, but DeepSpeed will ask for a backward
            return out.hidden.detach().requires_grad_()
        if loss is None or not loss.requires_grad:
            return out.hidden
        injected: Tensor = _Inject.apply(out.hidden, loss, self._injected_scale)
        return injected

    def _injected_scale(self) -> float:
        """What the gradients that come from the next stage are multiplied by: fp16's loss scale."""
        return private.loss_scaler_state(self.deepspeed).get("cur_scale", 1.0)

    def _before_reduction(self) -> None:
        pipe.count_fillers(self.deepspeed)
        if self.tied:
            self.tied.send_gradient()
        self._partial.sum()
        self._step.tally.sum_over_ranks()
        one_or_nan = self._step.one_or_nan()
        gradients = (private.gradient(self.deepspeed, parameter) for parameter in self._replica.model.parameters())
        first = next((gradient for gradient in gradients if gradient is not None), None)
        if first is not None:  # a stage without gradients learns the others' in the norm
            first.mul_(one_or_nan)
        self._step.before_change()  # nothing of ours comes between this and the optimizer


class _Inject(torch.autograd.Function):
    """x as it is; in the backward a loss that nothing else depends on gets its gradient, which is 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, scale: Callable[[], float]) -> Tensor:
        ctx.scale, ctx.like = scale, loss.detach()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, torch.full_like(ctx.like, ctx.scale()), None


class TiedTable:
    """What trains of the token table of the first stage (its weight, or its adapter) and its copy in the last one, on
    the ranks `first` and `last`; elsewhere, and where these are one rank, nothing.
    """

    def __init__(self, deepspeed: Any, replica: Replica, first: int, last: int) -> None:
        self._deepspeed = deepspeed
        self._peer = {first: last, last: first}.get(replica.world.rank) if first != last else None
        self._owner = replica.world.rank == first
        self.gradient_sums: dict[Tensor, Tensor] = {}
        """Of each of the copy's parameters, the sum of its gradients of this step so far."""
        self._parameters: list[Tensor] = []
        if self._peer is not None:
            self._parameters = [p for p in replica.model.tok_embeddings.parameters() if p.requires_grad]
            for parameter in self._parameters if not self._owner else ():
                parameter.register_post_accumulate_grad_hook(self._add)

    def _add(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        if parameter in self.gradient_sums:
            self.gradient_sums[parameter] += parameter.grad
        else:
            self.gradient_sums[parameter] = parameter.grad.float()
        parameter.grad = None

    @torch.no_grad()
    def send_gradient(self) -> None:
        """Add the copy's gradients of this step to those of the first stage, in float32."""
        for parameter in self._parameters:
            if self._owner:
                received = torch.empty_like(parameter, dtype=torch.float32)
                dist.recv(received, self._peer)
                own = private.gradient(self._deepspeed, parameter)
                assert own is not None
                own += received.view_as(own)  # which may be flat
            else:
                found = self.gradient_sums.pop(parameter, None)  # None where no loss reads the copy
                dist.send(torch.zeros_like(parameter, dtype=torch.float32) if found is None else found, self._peer)

    @torch.no_grad()
    def send_weight(self) -> None:
        """Make the copy what the first stage's table is."""
        for parameter in self._parameters:
            if self._owner:
                dist.send(parameter.detach(), self._peer)
            else:
                dist.recv(parameter.detach(), self._peer)
