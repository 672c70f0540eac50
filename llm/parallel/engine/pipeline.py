"""A training step of one rank of a pipeline, on DeepSpeed's pipeline engine.

A rank holds one stage of the model, or with the DualPipeV schedule two: one on the way from the first rank to the last,
one on the way back. One tensor goes from stage to stage: the residual stream. Token ids, labels and document boundaries
are the same on all stages, because each rank reads the same micro-batches; a stage's forwards come in their order, so
its next forward is of the next micro-batch. Without gradients there is no schedule: all micro-batches go through one
stage of a rank and then through the other, and ranks only wait for what they need.

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
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from llm.cache import Cache
from llm.data.batch import MicroBatch, StepBatch
from llm.datatypes import TransformerInput
from llm.generate import Decoder
from llm.parallel.engine import deepspeed_pipeline as pipe
from llm.parallel.engine import deepspeed_private as private
from llm.parallel.engine.engine import Engine
from llm.parallel.engine.step import Tally
from llm.parallel.grid import Grid
from llm.parameters import ParameterTable

EVALUATED_AT_ONCE = 4
"""Micro-batches of a validation that go through the pipeline together, for each rank of it."""
MOST_DIMENSIONS = 3
"""Of what goes from stage to stage."""


class PipelineEngine(Engine):
    """An Engine whose model is a rank's stages, built by llm/parallel/build.py for the same grid."""

    _tally: Tally
    _losses: list[Tensor]
    _loss_limit: float | None

    def _initialize(self, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
        layout, is_moe = self.grid.layout, [spec.ffn == "moe" for spec in self.model.specs]
        self._n_moe_layers = sum(is_moe)
        self._moe_layers = [
            range(sum(is_moe[: stage.layers.start]), sum(is_moe[: stage.layers.stop])) for stage in self.model.stages
        ]
        self._queues: list[deque[MicroBatch]] = [deque() for _ in self.model.stages]
        self._shape: tuple[int, ...] = ()
        self._expert_counts = torch.zeros(0, 0, dtype=torch.int64)
        ends = [self.grid.pipeline.ranks[layout.holder(stage)] for stage in (0, layout.stages - 1)]
        self._last_rank = ends[1]
        self._tied = _Tied(self, *ends) if self.model.args.tie_embeddings and ends[0] != ends[1] else None
        return pipe.initialize(self.model, self._next_forward, self._before_reduction, optimizer, config, self.grid)

    def _stage_of(self, name: str) -> int:
        row = ParameterTable.of(self.model.args)[name]
        owns = [stage.owns(row) for stage in self.model.stages]
        return owns.index(True) if any(owns) else len(owns) - 1  # the last stage's copy of a tied table

    def _compute_and_apply(
        self, batch: StepBatch, tally: Tally, losses: list[Tensor], loss_limit: float | None
    ) -> float:
        self._tally, self._losses, self._loss_limit = tally, losses, loss_limit
        pipe.train(self._deepspeed, self._feed(batch.micro_batches), len(batch.micro_batches))
        norm = private.gradient_norm(self._deepspeed)
        if math.isfinite(norm):
            private.grow_loss_scale(self._deepspeed)
            if self._tied:
                self._tied.send_weight()
        else:
            private.forget_gradients(self._deepspeed)
        return norm

    def _feed(self, micro_batches: list[MicroBatch]) -> Iterator[tuple[Tensor, Tensor]]:
        """The micro-batches for DeepSpeed, and for this stage's forwards."""
        self._queues = [deque(micro_batches) for _ in self.model.stages]
        shape = tuple(micro_batches[0].tokens_BT.shape)
        if shape != self._shape:
            pipe.forget_shape(self._deepspeed)
            self._shape = shape
        return ((batch.tokens_BT, batch.labels_BT) for batch in micro_batches)

    def logits(self, inputs: TransformerInput, caches: Sequence[Cache]) -> Tensor:
        """Float32 logits (B, V) of each row's last token, on all ranks (collective, without gradients). The tokens
        continue the rows of the caches, one for each stage of this rank.
        """
        found = self._through_stages([inputs], caches)
        shape = len(inputs.tokens), self.model.args.vocab_size
        logits_BV = found[0] if found else torch.empty(shape, device=self.world.device)
        dist.broadcast(logits_BV, self._last_rank, group=self.grid.pipeline.handle)
        return logits_BV

    @torch.no_grad()
    def _through_stages(
        self, batches: Sequence[MicroBatch | TransformerInput], caches: Sequence[Cache] | None = None
    ) -> list[Tensor]:
        """What the last stage makes of each batch, where it is; elsewhere nothing (collective)."""
        self.model.eval()
        layout, ranks, here = self.grid.layout, self.grid.pipeline.ranks, self.grid.pipeline.rank
        results: list[Tensor] = []
        turning: deque[Tensor] = deque()  # from this rank's one stage to its other
        for phase, stage in enumerate(self.model.stages):
            source, target = (layout.holder(stage.number + step) for step in (-1, 1))
            for batch in batches:
                if stage.first:
                    x = torch.empty(0, device=self.world.device)  # the batch has what it takes
                else:
                    x = turning.popleft() if source == here else self._receive(ranks[source])
                x = self._forward(x, phase, batch, None if caches is None else caches[phase])
                if stage.last:
                    results.append(x)
                elif target == here:
                    turning.append(x)
                else:
                    self._send(x, ranks[target])
        return results

    def _send(self, x: Tensor, rank: int) -> None:
        shape = torch.tensor([*x.shape, *[-1] * (MOST_DIMENSIONS - x.dim())], device=x.device)
        dist.send(shape, rank)
        dist.send(x.contiguous(), rank)

    def _receive(self, rank: int) -> Tensor:
        shape = torch.empty(MOST_DIMENSIONS, dtype=torch.int64, device=self.world.device)
        dist.recv(shape, rank)
        dtype = next(self.model.parameters()).dtype
        x = torch.empty([size for size in shape.tolist() if size >= 0], dtype=dtype, device=self.world.device)
        dist.recv(x, rank)
        return x

    def decoder(self) -> Decoder:
        return _ThroughStages(self)

    def _next_forward(self, x: Tensor, phase: int) -> Tensor:
        """A stage of its next micro-batch."""
        return self._forward(x, phase, self._queues[phase].popleft())

    def _forward(
        self, x: Tensor, phase: int, batch: MicroBatch | TransformerInput, cache: Cache | None = None
    ) -> Tensor:
        model, stage = self.model, self.model.stages[phase]
        inputs = batch if isinstance(batch, TransformerInput) else self._inputs(batch)
        ctx = model.context(inputs, cache)
        if stage.first:
            x = model.embed(inputs)
        else:
            model.region.begin(inputs.tokens.numel())
        x, stats = model.through_layers(x, ctx, stage.layers)
        if cache is not None:
            cache.forget()
        training = torch.is_grad_enabled()
        auxiliary = x.new_zeros((), dtype=torch.float32)
        ranks = self.grid.data.size
        if stats and training:
            tally = self._tally
            balance = torch.stack([layer.balance_sum for layer in stats]).sum()
            z = torch.stack([layer.z_sum for layer in stats]).sum()
            counts = torch.stack([layer.expert_counts for layer in stats])
            tally.add_routing(balance, z, counts, self._moe_layers[phase].start)
            auxiliary = (balance + z) * (ranks / tally.n_tokens)
        if not stage.last:
            return _Inject.apply(x, auxiliary, self) if auxiliary.requires_grad else x
        if isinstance(batch, TransformerInput):
            return model.logits(model.finish(x, inputs)[:, -1:])[:, 0]
        loss_sum = model.loss_sum(model.finish(x, inputs), batch.labels_BT.to(self.world.device))
        if not training:
            return loss_sum
        if self.grid.reports_loss:
            self._tally.add_loss(loss_sum)
        loss = loss_sum * (ranks / max(self._tally.n_targets, 1)) + auxiliary
        self._losses.append(loss.detach())
        return loss * self._deepspeed.gradient_accumulation_steps()  # by which DeepSpeed divides it

    @property
    def injected_scale(self) -> float:
        """What the gradients that come from the next stage are multiplied by: fp16's loss scale."""
        return private.loss_scaler_state(self._deepspeed).get("cur_scale", 1.0)

    def _before_reduction(self) -> None:
        pipe.count_fillers(self._deepspeed)
        if self._tied:
            self._tied.send_gradient()
        self._tally.sum_over_ranks()
        one_or_nan = self._tally.one_or_nan(self._loss_limit)
        gradients = (pipe.gradient(self._deepspeed, parameter) for parameter in self.model.parameters())
        next(gradient for gradient in gradients if gradient is not None).mul_(one_or_nan)
        self.before_change()  # nothing of ours comes between this and the optimizer

    def _publish(self) -> None:
        super()._publish()
        if self._tied:
            self._tied.send_weight()

    def _loss_sums(self, batches: Iterator[MicroBatch]) -> Iterator[tuple[MicroBatch, Tensor]]:
        none = torch.zeros((), device=self.world.device)
        while chunk := list(islice(batches, EVALUATED_AT_ONCE * self.grid.pipeline.size)):
            sums = self._through_stages(chunk)
            yield from zip(chunk, sums or [none] * len(chunk), strict=True)

    def expert_counts(self) -> Tensor:
        if not len(self._expert_counts) and self._n_moe_layers:
            assert self.model.args.moe is not None
            return torch.zeros(self._n_moe_layers, self.model.args.moe.n_experts, dtype=torch.int64)
        return self._expert_counts

    def set_expert_counts(self, counts: Tensor) -> None:
        expected = self.expert_counts().shape
        if counts.shape != expected:
            raise ValueError(
                f"expert counts must have shape {tuple(expected)} (MoE layers, experts); got {tuple(counts.shape)}"
            )
        self._expert_counts = counts
        mine = [counts[layers.start : layers.stop] for layers in self._moe_layers]
        if any(map(len, mine)):
            self.model.set_expert_counts(torch.cat(mine))


class _ThroughStages:
    """A model in stages, of which each rank keeps what its own have made of the rows so far."""

    def __init__(self, engine: PipelineEngine) -> None:
        self._engine = engine
        self._caches = [Cache(engine.model.args) for _ in engine.model.stages]

    def logits(self, tokens: NDArray[np.int64], positions: NDArray[np.int64]) -> Tensor:
        inputs = TransformerInput(torch.from_numpy(tokens).to(self._engine.world.device), torch.from_numpy(positions))
        return self._engine.logits(inputs, self._caches)

    def keep(self, rows: list[int]) -> None:
        for cache in self._caches:
            cache.reorder(rows)


class _Inject(torch.autograd.Function):
    """x as it is; in the backward a loss that nothing else depends on gets its gradient, which is 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, engine: PipelineEngine) -> Tensor:
        ctx.engine, ctx.like = engine, loss.detach()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, torch.full_like(ctx.like, ctx.engine.injected_scale), None


class _Tied:
    """The token table of the first stage and its copy in the last one, on these ranks."""

    def __init__(self, engine: PipelineEngine, first: int, last: int) -> None:
        self.engine = engine
        self.peer = {first: last, last: first}.get(engine.world.rank)
        self.owner = engine.world.rank == first
        self._sum: Tensor | None = None
        if self.peer is not None:
            self.weight: Tensor = engine.model.tok_embeddings.weight
            if not self.owner:
                self.weight.register_post_accumulate_grad_hook(self._add)

    def _add(self, weight: Tensor) -> None:
        assert weight.grad is not None
        if self._sum is None:
            self._sum = weight.grad.float()
        else:
            self._sum += weight.grad
        weight.grad = None

    @torch.no_grad()
    def send_gradient(self) -> None:
        """Add the copy's gradient of this step to that of the first stage, in float32."""
        if self.peer is None:
            return
        if self.owner:
            received = torch.empty_like(self.weight, dtype=torch.float32)
            dist.recv(received, self.peer)
            own = pipe.gradient(self.engine._deepspeed, self.weight)
            assert own is not None
            own += received.view_as(own)  # which may be flat
        else:
            assert self._sum is not None
            dist.send(self._sum, self.peer)
            self._sum = None

    @torch.no_grad()
    def send_weight(self) -> None:
        """Make the copy what the first stage's weight is."""
        if self.peer is None:
            return
        if self.owner:
            dist.send(self.weight.detach(), self.peer)
        else:
            dist.recv(self.weight.detach(), self.peer)


def engine_class(grid: Grid) -> type[Engine]:
    """The engine for a grid: with stages or without."""
    return PipelineEngine if grid.pipeline.size > 1 else Engine
