"""One training step on DeepSpeed: micro-batches in, losses and gradient norm out, the same numbers on every layout.

The loss of a step is the sum of the targets' negative log-likelihood over the *global* batch, divided by N, its
number of targets. DeepSpeed averages gradients over data-parallel ranks, so each micro-batch hands it its own sum
times their number / N: whatever the cut, every target weighs 1/N. The losses of the MoE router have their own
denominator, the number of tokens in the global batch.

A step is applied whole or not at all. The global loss is known before the last backward; where it is not finite, or
above the limit given, that backward is made non-finite, and DeepSpeed drops a step with such gradients on all ranks:
one mechanism for every reason, without waiting for the device.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm.data.batch import MicroBatch, StepBatch
from llm.datatypes import TransformerInput
from llm.generate import Decoder
from llm.model import LLM
from llm.parallel.collectives import agreed_error, gather_json, sum_over_ranks
from llm.parallel.engine import deepspeed_private as private
from llm.parallel.engine.culprits import GradientProbes, find_culprits
from llm.parallel.engine.options import deepspeed_config, with_extra
from llm.parallel.engine.state import TrainState
from llm.parallel.engine.step import Overflows, Skipped, StepResult, Tally
from llm.parallel.grid import Grid
from llm.parallel.muon import Muon
from llm.parallel.precision import check_precision


class Engine:
    """DeepSpeed around an LLM built by llm/parallel/build.py for the same ZeRO stage.

    `optimizer` is a torch optimizer over groups of the model's parameters, each with `lr_factor` beside torch's own
    keys; DeepSpeed replaces its parameters by flat float32 partitions. In bf16 and fp16 the masters are drawn anew in
    float32, because DeepSpeed would otherwise start from the rounded parameters.
    """

    def __init__(
        self,
        model: LLM,
        optimizer: torch.optim.Optimizer,
        *,
        grid: Grid,
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
        self.grid = grid
        self.world = world = grid.world
        self.model = model
        self.precision = precision
        if precision == "fp32" and zero_stage == 1 and world.size == 1 and not offload_optimizer:
            zero_stage = 0  # nothing to cut: masters beside the parameters, and copies of gradients, would only cost
        self.zero_stage = zero_stage
        self._clip_norm = clip_norm
        config = deepspeed_config(precision, zero_stage, offload_optimizer, clip_norm, grid.expert.size > 1)
        config["train_micro_batch_size_per_gpu"] = micro_batch_size
        config["gradient_accumulation_steps"] = max_accumulation  # sizes its buffers; train_step says which is the last
        check_precision(precision)
        name_of = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = optimizer.param_groups
        members = [(group, name_of[id(p)]) for group in groups for p in group["params"] if id(p) in name_of]
        self._deepspeed = self._initialize(optimizer, with_extra(config, extra_config or {}))
        private.grow_loss_scale_late(self._deepspeed)
        if world.size == 1:
            private.skip_reduction(self._deepspeed)
        self._refuse_unequal_parts()
        self.state = TrainState(
            self._deepspeed,
            model,
            grid,
            zero_stage=zero_stage,
            seed=None if precision == "fp32" else seed,
            ema_decay=ema_decay,
            frozen={name for group, name in members if group["lr_factor"] == 0},
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
        self._probes = GradientProbes(model, grid, self._stage_of)

    def _refuse_unequal_parts(self) -> None:
        parts = len(private.partitions(self._deepspeed))
        if self.zero_stage == 3 and len(set(gather_json(parts, self.world))) > 1:  # it would wait for ever
            tensor = self.grid.tensor.size
            raise agreed_error(
                f"model.vocab_size={self.model.args.vocab_size}: parallel.tensor={tensor} leaves ranks so unequal "
                f"parts that ZeRO-3 cuts them differently; use a multiple of {tensor}, or zero_stage=2"
            )

    def _initialize(self, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
        return private.initialize(self.model, optimizer, config, self.grid)

    def _stage_of(self, name: str) -> int:
        """Which of this rank's stages a parameter belongs to."""
        return 0

    def _publish(self) -> None:
        """Make the masters the weights of the next forward (collective)."""
        private.publish_masters(self._deepspeed)

    @property
    def gradient_scale(self) -> float:
        """How many times the gradient of a rank's micro-batch is larger than its part of the global gradient."""
        return self.grid.data.size * private.loss_scaler_state(self._deepspeed).get("cur_scale", 1.0)

    def train_step(
        self, batch: StepBatch, n_targets: int, n_tokens: int, lr: float, loss_limit: float | None = None
    ) -> StepResult:
        """Forward and backward over this rank's micro-batches, one optimizer step at learning rate `lr` (collective).

        n_targets, n_tokens: of the global batch. loss_limit: no update where the loss is above it. Every group steps at
        its own `lr_factor` times lr.
        """
        for group in private.base_optimizer(self._deepspeed).param_groups:
            group["lr"] = lr * group["lr_factor"]
        tally = Tally(self.model.args, n_targets, n_tokens, self.world)
        losses: list[Tensor] = []
        self._probes.reset()
        self.model.train()
        at_lowest = private.loss_scale_is_lowest(self._deepspeed)
        norm = self._compute_and_apply(batch, tally, losses, loss_limit)
        result = tally.result(norm, self.grid.expert.size)
        result.loss_scale = private.loss_scaler_state(self._deepspeed).get("cur_scale")
        if math.isfinite(norm):
            if tally.counts is not None:
                self.set_expert_counts(tally.counts)
            self.state.averages.update()
            self._overflows.applied()
        else:
            result.skipped = self._why_skipped(result.loss, loss_limit, at_lowest)
            if result.skipped in ("loss", "gradient"):
                result.culprits = find_culprits(self.grid, self._probes, batch, losses)
        return result

    def _compute_and_apply(
        self, batch: StepBatch, tally: Tally, losses: list[Tensor], loss_limit: float | None
    ) -> float:
        """The step itself: fills the tally, and the losses of this rank's micro-batches as they were handed to
        DeepSpeed; the norm of the gradients, inf where they were not applied.
        """
        engine, ranks = self._deepspeed, self.grid.data.size
        last = len(batch.micro_batches) - 1
        for m, micro_batch in enumerate(batch.micro_batches):
            engine.set_gradient_accumulation_boundary(m == last)
            output = engine(self._inputs(micro_batch), labels=micro_batch.labels_BT.to(self.world.device))
            loss = output.loss_sum * (ranks / max(tally.n_targets, 1))
            if self.grid.reports_loss:  # its tensor-parallel peers have the same loss, but other tokens' routing
                tally.add_loss(output.loss_sum)
            if output.expert_counts is not None:
                loss = loss + (output.balance_sum + output.z_sum) * (ranks / tally.n_tokens)
                tally.add_routing(output.balance_sum, output.z_sum, output.expert_counts)
            losses.append(loss.detach())
            if m == last:
                tally.sum_over_ranks()
                loss = loss * tally.one_or_nan(loss_limit)
            engine.backward(loss, scale_wrt_gas=False)
            if m < last:
                engine.step()  # updates nothing yet: DeepSpeed wants it after each backward
        return self._finish_step()

    def _finish_step(self) -> float:
        """Apply the gradients unless they are not finite; their norm, inf if they were not applied."""
        engine = self._deepspeed
        self.before_change()
        if self.zero_stage:
            engine.step()
            reported = private.gradient_norm(engine)
            if math.isfinite(reported):
                private.grow_loss_scale(engine)
            else:
                private.forget_gradients(engine)
            return reported
        parameters = list(self.model.parameters())
        norm = _total_norm([p.grad for p in parameters if p.grad is not None])
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

    @torch.no_grad()
    def sum_nll(self, batches: Iterator[MicroBatch], token_bytes: np.ndarray) -> tuple[float, int, int]:
        """Sum of negative log-likelihood (nats), number of targets, and bytes of text they stand for, over all ranks
        (collective).

        `token_bytes` is the UTF-8 length of each token (vocab,), 0 for special tokens.
        """
        self.model.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        n_targets = n_bytes = 0
        for batch, loss_sum in self._loss_sums(batches):
            total += loss_sum.double()
            targets = batch.labels_BT[batch.labels_BT >= 0].numpy()
            n_targets += targets.size
            n_bytes += int(token_bytes[targets].sum())
        mine = [float(total), n_targets, n_bytes] if self.grid.reports_loss else [0.0, 0, 0]
        nll, *counts = sum_over_ranks(mine, self.world)
        return nll, int(counts[0]), int(counts[1])

    def _loss_sums(self, batches: Iterator[MicroBatch]) -> Iterator[tuple[MicroBatch, Tensor]]:
        """Each batch and the sum of its loss, where this rank knows it, else 0 (collective, without gradients)."""
        for batch in batches:
            output = self.model(self._inputs(batch), labels=batch.labels_BT.to(self.world.device))
            yield batch, output.loss_sum

    def expert_counts(self) -> Tensor:
        """(M, E) int64: assignments of the previous whole step in all layers of the whole model."""
        return self.model.expert_counts()

    def set_expert_counts(self, counts: Tensor) -> None:
        """Set them. Raises ValueError on a wrong shape."""
        self.model.set_expert_counts(counts)

    def decoder(self) -> LLM | Decoder:
        """What continues prompts with the present weights; used by all ranks together, where one has not all of them.
        """
        self.model.eval()
        return self.model

    def _inputs(self, batch: MicroBatch) -> TransformerInput:
        return TransformerInput(tokens=batch.tokens_BT.to(self.world.device), cu_seqlens=batch.cu_seqlens)

    def prepare_load(self, kinds: dict[str, set[str]], scalars: dict[str, float]) -> None:
        """Make room for what a checkpoint has: see `TrainState.prepare_load`."""
        self.before_change()
        self.state.prepare_load(kinds, scalars)

    def finish_load(self) -> None:
        """Make the loaded masters the weights of the next forward (collective)."""
        self._publish()


def _nothing() -> None:
    return None


def _total_norm(grads: list[Tensor]) -> Tensor:
    """2-norm of all elements, float64: row by row, as a CPU adds up a whole tensor in one long float32 sum, which is
    wrong by 8e-4 at 16 million elements."""
    rows = (torch.linalg.vector_norm(grad, dim=-1) for grad in grads)
    return torch.stack([torch.linalg.vector_norm(row, dtype=torch.float64) for row in rows]).norm()
