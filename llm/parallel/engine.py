"""One training step on DeepSpeed: micro-batches in, losses and gradient norm out, the same numbers on every layout.

The loss of a step is the sum of the targets' negative log-likelihood over the *global* batch, divided by N, its
number of targets. DeepSpeed averages gradients over ranks and over micro-batches, so each micro-batch hands it its
own sum times (accumulation x ranks) / N: whatever the cut, every target weighs 1/N. The losses of the MoE router have
their own denominator, the number of tokens in the global batch.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llm import init
from llm.data.batch import MicroBatch, StepBatch
from llm.datatypes import TransformerInput
from llm.model import LLM
from llm.parallel import deepspeed_private as private
from llm.parallel.collectives import sum_over_ranks
from llm.parallel.launch import World
from llm.plans import plan_for


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step was made of; every number is global and equal on all ranks. Losses in nats."""

    loss: float
    lm_loss: float
    moe_balance_loss: float
    moe_z_loss: float
    grad_norm: float
    n_targets: int
    n_tokens: int
    routing_checksum: int | None
    """CRC-32 of how many tokens each expert of each layer got: equal on two layouts only if every routing decision
    is.
    """


class OwnedFragment(NamedTuple):
    """A flat range [start, start + len(values)) of a whole parameter, and where its values live on this rank."""

    name: str
    kind: str
    start: int
    values: Tensor


def parameter_groups(model: LLM, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups, decayed and not, by the table in llm/plans.py."""
    decayed: list[Tensor] = []
    kept: list[Tensor] = []
    for name, parameter in model.named_parameters():
        (decayed if plan_for(name).decay else kept).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


class Engine:
    """DeepSpeed ZeRO-1 around an LLM.

    `optimizer` is a torch optimizer over `parameter_groups(model)`; DeepSpeed replaces its parameters by flat float32
    pieces. In bf16 the masters are drawn anew in float32, because DeepSpeed would otherwise start from the rounded
    parameters.
    """

    def __init__(
        self,
        model: LLM,
        optimizer: torch.optim.Optimizer,
        *,
        world: World,
        precision: str,
        micro_batch_size: int,
        accumulation: int,
        clip_norm: float,
        seed: int,
        extra_config: dict[str, Any] | None = None,
    ) -> None:
        self.world = world
        self.model = model
        self.accumulation = accumulation
        self.precision = precision
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": micro_batch_size,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": clip_norm,
            "zero_optimization": {"stage": 1, "overlap_comm": False},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        }
        if precision == "bf16":
            config["bf16"] = {"enabled": True}
            config["data_types"] = {"grad_accum_dtype": "fp32"}
        for key, value in (extra_config or {}).items():
            config[key] = {**config[key], **value} if isinstance(config.get(key), dict) else value
        self._deepspeed = private.initialize(model, optimizer, config)
        if precision == "bf16":
            self._draw_masters(seed)

    def _draw_masters(self, seed: int) -> None:
        for name, parameter in self.model.named_parameters():
            owned = private.owned_range(parameter)
            if owned is not None:
                start, length = owned
                values = init.initial_values(self.model.args, name, seed, start, start + length)
                private.owned_master(parameter).data.copy_(values)
        private.publish_masters(self._deepspeed)

    def train_step(self, batch: StepBatch, n_targets: int, n_tokens: int, lr: float) -> StepResult:
        """Forward and backward over this rank's micro-batches, one optimizer step at learning rate `lr` (collective).

        n_targets, n_tokens: of the global batch.
        """
        engine, world = self._deepspeed, self.world
        scale = len(batch.micro_batches) * world.size
        sums = torch.zeros(3, dtype=torch.float64, device=world.device)
        counts: Tensor | None = None
        self.model.train()
        for micro_batch in batch.micro_batches:
            output = engine(self._inputs(micro_batch), labels=micro_batch.labels_BT.to(world.device))
            loss = output.loss_sum * (scale / max(n_targets, 1))
            sums[0] += output.loss_sum.detach().double()
            if output.expert_counts is not None:
                loss = loss + (output.balance_sum + output.z_sum) * (scale / n_tokens)
                sums[1] += output.balance_sum.detach().double()
                sums[2] += output.z_sum.detach().double()
                counts = output.expert_counts if counts is None else counts + output.expert_counts
            engine.backward(loss)
            if engine.is_gradient_accumulation_boundary():
                for group in engine.optimizer.param_groups:
                    group["lr"] = lr
            engine.step()
        totals = sum_over_ranks(sums.tolist() + ([] if counts is None else counts.flatten().tolist()), world)
        checksum = None
        if counts is not None:
            global_counts = torch.tensor(totals[3:], dtype=torch.int64).view(counts.shape)
            self.model.set_expert_counts(global_counts)
            checksum = zlib.crc32(global_counts.numpy().tobytes())
        lm, balance, z = totals[0] / max(n_targets, 1), totals[1] / n_tokens, totals[2] / n_tokens
        return StepResult(
            loss=lm + balance + z,
            lm_loss=lm,
            moe_balance_loss=balance,
            moe_z_loss=z,
            grad_norm=private.gradient_norm(engine),
            n_targets=n_targets,
            n_tokens=n_tokens,
            routing_checksum=checksum,
        )

    @torch.no_grad()
    def sum_nll(self, batches: Iterator[MicroBatch], token_bytes: np.ndarray) -> tuple[float, int, int]:
        """Sum of negative log-likelihood (nats), number of targets, and bytes of text they stand for, over all ranks
        (collective).

        `token_bytes` is the UTF-8 length of each token (vocab,), 0 for special tokens.
        """
        self.model.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        n_targets = n_bytes = 0
        for batch in batches:
            output = self.model(self._inputs(batch), labels=batch.labels_BT.to(self.world.device))
            total += output.loss_sum.double()
            targets = batch.labels_BT[batch.labels_BT >= 0].numpy()
            n_targets += targets.size
            n_bytes += int(token_bytes[targets].sum())
        nll, *counts = sum_over_ranks([float(total), n_targets, n_bytes], self.world)
        return nll, int(counts[0]), int(counts[1])

    def _inputs(self, batch: MicroBatch) -> TransformerInput:
        return TransformerInput(tokens=batch.tokens_BT.to(self.world.device), cu_seqlens=batch.cu_seqlens)

    def owned_fragments(self) -> Iterator[OwnedFragment]:
        """The masters and optimizer states that this rank owns; over all ranks each parameter exactly once."""
        for name, parameter in self.model.named_parameters():
            owned = private.owned_range(parameter)
            if owned is not None:
                yield OwnedFragment(name, "master", owned[0], private.owned_master(parameter).data)
                for key, values in private.owned_states(self._deepspeed, parameter):
                    yield OwnedFragment(name, key, owned[0], values)

    def optimizer_scalars(self) -> dict[str, float]:
        """Optimizer state that is one number, such as AdamW's step count."""
        return private.optimizer_scalars(self._deepspeed)

    def prepare_load(self, state_keys: list[str], scalars: dict[str, float]) -> None:
        """Create optimizer state, so that `owned_fragments` lists everything that a checkpoint must fill."""
        private.create_optimizer_state(self._deepspeed, state_keys, scalars)

    def finish_load(self) -> None:
        """Make the loaded masters the weights of the next forward (collective)."""
        private.publish_masters(self._deepspeed)
