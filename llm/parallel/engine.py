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
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llm import init
from llm.boxes import Box, whole
from llm.data.batch import MicroBatch, StepBatch
from llm.datatypes import TransformerInput
from llm.generate import Decoder
from llm.model import LLM
from llm.parallel import deepspeed_private as private
from llm.parallel.build import whole_shapes
from llm.parallel.collectives import agreed_error, gather_json, sum_over_ranks
from llm.parallel.grid import Grid, stage_name
from llm.parallel.muon import Muon
from llm.parallel.precision import check_precision
from llm.parallel.step import Overflows, Skipped, StepResult, Tally
from llm.plans import plan_for

ZERO3_SUB_GROUP = 1 << 24
"""Elements of a rank's share that ZeRO-3 makes masters of, and steps, at a time: twice their float32 size is what it
needs above what it keeps."""


class OwnedFragment(NamedTuple):
    """Elements [start, start + len(values)) of a flattened box of a parameter, and where they live on this rank."""

    name: str
    kind: str
    box: Box
    start: int
    values: Tensor


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
        for key, value in (extra_config or {}).items():
            config[key] = {**config[key], **value} if isinstance(config.get(key), dict) else value
        check_precision(precision)
        name_of = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = optimizer.param_groups
        members = [(group, name_of[id(p)]) for group in groups for p in group["params"] if id(p) in name_of]
        self._frozen = {name for group, name in members if group["lr_factor"] == 0}
        self._of_muon = {name for group, name in members if group.get("muon")}
        self._deepspeed = self._initialize(optimizer, config)
        private.grow_loss_scale_late(self._deepspeed)
        if world.size == 1:
            private.skip_reduction(self._deepspeed)
        self.shapes = whole_shapes(model.args)
        self.boxes = {name: grid.box(model.args, name, shape) for name, shape in self.shapes.items()}
        self._owned = private.owned_ranges(self._deepspeed, model)
        self._partitions = private.partitions(self._deepspeed)
        if zero_stage == 3 and len(set(gather_json(len(self._partitions), world))) > 1:  # it would wait for ever
            raise agreed_error(
                f"model.vocab_size={model.args.vocab_size}: parallel.tensor={grid.tensor.size} leaves ranks so unequal "
                f"parts that ZeRO-3 cuts them differently; use a multiple of {grid.tensor.size}, or zero_stage=2"
            )
        if isinstance(optimizer, Muon):
            names = private.names_by_partition(self._deepspeed, model)
            cut = grid if zero_stage else None
            optimizer.describe(self._partitions, names, self.shapes, self.boxes, self._owned, cut)
        if precision != "fp32":
            self._draw_masters(seed)
        self._overflows = Overflows()
        self._ema_decay = ema_decay
        self._ema = [flat.detach().clone() for flat in self._partitions] if ema_decay is not None else []
        self._ema_of = dict(zip(map(id, self._partitions), self._ema, strict=False))
        self.before_change: Callable[[], object] = _nothing
        """Called each time before masters, optimizer state or averages change."""
        self._stages = grid.layout.stages_of(grid.pipeline.rank)
        self._probes = torch.zeros(len(self._stages), device=world.device)  # not finite once a stage's gradient was not
        for name, parameter in model.named_parameters():
            if grid.expert.size == 1 or plan_for(name).ep_dim is None:  # else it is of other ranks' tokens too
                parameter.register_hook(partial(self._probe_gradient, self._stage_of(name)))

    def _initialize(self, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
        return private.initialize(self.model, optimizer, config, self.grid)

    def _stage_of(self, name: str) -> int:
        """Which of this rank's stages a parameter belongs to."""
        return 0

    def _probe_gradient(self, stage: int, grad: Tensor) -> None:
        self._probes[stage].add_(grad.sum(dtype=torch.float32))

    @torch.no_grad()
    def _draw_masters(self, seed: int) -> None:
        for owned in self._owned:
            place = (self.shapes[owned.name], self.boxes[owned.name], owned.start, owned.start + owned.length)
            owned.of(owned.flat).copy_(init.initial_values_in_box(self.model.args, owned.name, seed, *place))
        self._publish()

    def _publish(self) -> None:
        """Make the masters the weights of the next forward (collective)."""
        private.publish_masters(self._deepspeed)

    @property
    def n_parameters(self) -> int:
        """Elements of all parameters of the whole model."""
        return sum(math.prod(shape) for shape in self.shapes.values())

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
        self._probes.zero_()
        self.model.train()
        at_lowest = private.loss_scale_is_lowest(self._deepspeed)
        norm = self._compute_and_apply(batch, tally, losses, loss_limit)
        result = tally.result(norm, self.grid.expert.size)
        result.loss_scale = private.loss_scaler_state(self._deepspeed).get("cur_scale")
        if math.isfinite(norm):
            if tally.counts is not None:
                self.set_expert_counts(tally.counts)
            self._update_ema()
            self._overflows.applied()
        else:
            result.skipped = self._why_skipped(result.loss, loss_limit, at_lowest)
            if result.skipped in ("loss", "gradient"):
                result.culprits = self._find_culprits(batch, losses)
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

    def _find_culprits(self, batch: StepBatch, losses: list[Tensor]) -> list[str]:
        """One line per rank, or group of tensor-parallel ranks, whose own loss or gradient was not finite; where none
        was, the sum over ranks was not."""
        group, data_rank, ranks = self.grid.tensor.ranks, self.grid.data.rank, self.grid.data.size
        who = f"rank {group[0]}" if len(group) == 1 else f"tensor-parallel ranks {', '.join(map(str, group))}"
        broken = [stage for stage, fine in zip(self._stages, self._probes.isfinite().tolist(), strict=True) if not fine]
        stage = max(broken, default=self._stages[-1])
        if self.grid.pipeline.size > 1:
            who = f"{who} ({stage_name(self.grid.layout, stage)})"
        micro_batches = len(batch.micro_batches)  # of which an earlier stage of a pipeline has no losses
        rows = batch.n_rows // (micro_batches * ranks)
        mine: list[str] = []
        for m, loss in enumerate(losses):
            if not bool(loss.isfinite()):
                first = batch.first_row + (m * ranks + data_rank) * rows
                mine.append(f"{who}: loss of rows {first} to {first + rows - 1} is {float(loss)}")
        if not mine and broken:
            spans = [batch.first_row + (m * ranks + data_rank) * rows for m in range(micro_batches)]
            named = ", ".join(f"{first} to {first + rows - 1}" for first in spans)
            mine.append(f"{who}: a gradient of rows {named} is not finite")
        gathered = [(at, lines) for at, lines in gather_json([stage, mine], self.world) if lines]
        behind = max((at for at, _ in gathered), default=0)  # the backward brings it to every stage before
        found = list(dict.fromkeys(line for at, lines in gathered if at == behind for line in lines))
        losses_bad = [line for line in found if ": loss" in line]  # a bad loss poisons every rank's last backward
        return losses_bad or found or ["no rank alone: the sum of their gradients is not finite"]

    @torch.no_grad()
    def _update_ema(self) -> None:
        if self._ema_decay is not None:
            torch._foreach_lerp_(self._ema, [flat.detach() for flat in self._partitions], 1 - self._ema_decay)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside, the model computes with the moving average of its weights (collective); needs ema_decay."""
        self._swap_ema()
        try:
            yield
        finally:
            self._swap_ema()

    @torch.no_grad()
    def _swap_ema(self) -> None:
        self.before_change()
        for flat, average in zip(self._partitions, self._ema, strict=True):
            kept = flat.detach().clone()
            flat.copy_(average)
            average.copy_(kept)
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

    def owned_fragments(self) -> Iterator[OwnedFragment]:
        """Masters, optimizer states and averages for a checkpoint; over all ranks each element exactly once."""
        for fragment in self.fragments():
            cut = fragment.box != whole(self.shapes[fragment.name])
            # at stage 0 every rank has it all; what is not cut, every tensor-parallel rank
            if self.world.is_main or (self.zero_stage and (cut or self.grid.leads)):
                yield fragment

    def fragments(self) -> Iterator[OwnedFragment]:
        """What a checkpoint must fill on this rank."""
        for owned in self._owned:
            place = (self.boxes[owned.name], owned.start)
            yield OwnedFragment(owned.name, "master", *place, owned.of(owned.flat.data))
            for key, values in private.states(self._deepspeed, owned.flat):
                yield OwnedFragment(owned.name, key, *place, owned.of(values))
            if self._ema:
                yield OwnedFragment(owned.name, "ema", *place, owned.of(self._ema_of[id(owned.flat)]))

    def optimizer_scalars(self) -> dict[str, float]:
        """State that is one number: AdamW's step count, fp16's loss scaler."""
        scaler = private.loss_scaler_state(self._deepspeed)
        return private.optimizer_scalars(self._deepspeed) | {f"loss_scaler.{k}": v for k, v in scaler.items()}

    def prepare_load(self, kinds: dict[str, set[str]], scalars: dict[str, float]) -> None:
        """Create optimizer state, so that `fragments` lists everything that a checkpoint must fill.

        kinds: for each parameter the kinds of fragments that the checkpoint has. On a new optimizer state all are zero;
        so is what the checkpoint lacks because it was frozen then. What is frozen now has none.
        """
        self.before_change()
        base = private.base_optimizer(self._deepspeed)
        foreign = "exp_avg" if isinstance(base, Muon) else "momentum_buffer"
        anew = any(foreign in kept and (name in self._of_muon or not self._of_muon) for name, kept in kinds.items())
        if anew:
            kinds = {name: {"master"} for name in kinds}  # of another optimizer
        state_of = base.state
        for number, flat in enumerate(self._partitions):
            # a partition of nothing is padding, and keeps step with the others
            names = [owned.name for owned in self._owned if owned.partition == number] or list(kinds)
            keys = set().union(*(kinds[name] for name in names if name not in self._frozen)) - {"master", "ema"}
            if not keys and "step" in scalars and not anew and not self._frozen.issuperset(names):  # frozen until now
                keys = {"momentum_buffer"} if self._of_muon.issuperset(names) else {"exp_avg", "exp_avg_sq"}
            held = state_of.get(flat, {})  # new memory would be there twice, and costs more than what is read into it
            state: dict[str, Tensor] = {
                key: held[key].zero_() if key in held else torch.zeros_like(flat, requires_grad=False)
                for key in sorted(keys)
            }
            if "exp_avg" in keys:
                state["step"] = torch.tensor(scalars["step"], device=flat.device)
            state_of[flat] = state
        scaler = {k.removeprefix("loss_scaler."): v for k, v in scalars.items() if k.startswith("loss_scaler.")}
        private.set_loss_scaler_state(self._deepspeed, scaler)

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


def deepspeed_config(
    precision: str, zero_stage: int, offload_optimizer: bool, clip_norm: float, experts_on_ranks: bool
) -> dict[str, Any]:
    """DeepSpeed's JSON for these settings, less the batch."""
    zero: dict[str, Any] = {"stage": zero_stage, "overlap_comm": False}
    if zero_stage == 1 and not torch.cuda.is_available() and not experts_on_ranks:
        zero["contiguous_gradients"] = False  # against fragmented GPU memory; elsewhere only a copy
    if zero_stage == 3:
        zero["sub_group_size"] = ZERO3_SUB_GROUP
    config: dict[str, Any] = {
        "gradient_clipping": clip_norm if zero_stage else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        config["zero_force_ds_cpu_optimizer"] = False  # torch's fused AdamW is as fast, and needs no compiler
    if precision == "bf16":
        # without immediate updates BF16_Optimizer adds up the bf16 gradients of earlier micro-batches again (measured)
        config["bf16"] = {"enabled": True, "check_grad_overflow": True, "immediate_grad_update": True}
    if precision == "fp16":
        config["fp16"] = {"enabled": True}  # loss scale 0: dynamic
    if precision != "fp32":
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["communication_data_type"] = "fp32"
    return config
