"""What an optimizer step was made of, summed over micro-batches and ranks.

Shapes: M number of MoE layers of the whole model, m those of a stage, E experts.
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from llm.args import ModelArgs
from llm.data.batch import StepBatch
from llm.datatypes import TransformerOutput
from llm.layers.moe import routing_shape
from llm.parallel.launch.world import World

Skipped = Literal["loss", "gradient", "limit", "overflow", "passed over"]


@dataclass
class StepResult:
    """What one optimizer step was made of; every number is global and equal on all ranks. Losses in nats."""

    loss: float
    lm_loss: float
    moe_balance_loss: float
    moe_z_loss: float
    grad_norm: float
    """Before clipping; inf where the step was not applied."""
    n_targets: int
    n_tokens: int
    routing_checksum: int | None
    """CRC-32 of how many tokens each expert of each layer got: equal on two layouts only if every routing decision
    is.
    """
    expert_load: float | None = None
    """Most tokens that an expert of any layer got, over an even share. All were served: nothing overflows."""
    expert_rank_load: float | None = None
    """The same of the ranks that experts lie on: how much longer the slowest one works; 1 where all have all experts.
    """
    loss_scale: float | None = None
    """Of fp16."""
    skipped: Skipped | None = None
    """Why weights and optimizer state were left as they were: the loss or a gradient was not finite, the loss was above
    its limit, fp16 overflowed and lowers its loss scale, which is part of its work, or the step was not to be made. In
    fp16 a gradient counts as not finite where no lower scale would help; see `Overflows`."""
    culprits: list[str] = field(default_factory=list)
    """Where the loss or gradient was not finite: rank, rows of the data order, losses of its micro-batches."""

    @classmethod
    def passed_over(cls, n_targets: int, n_tokens: int) -> "StepResult":
        """A step that was not computed: its losses are NaN."""
        unknown = (math.nan,) * 4
        return cls(*unknown, math.inf, n_targets, n_tokens, None, skipped="passed over")


class Overflows:
    """Tells fp16's overflows, which a lower loss scale cures, from gradients that are not finite at any scale.

    A single step cannot say which it was. But nothing is left to be cured where the scale cannot fall any further, or
    has fallen so often since a step went well that no gradient can have grown so much.
    """

    MOST_IN_A_ROW = 12
    """Steps; the scale is then a thousandth or less of one that was right."""

    def __init__(self) -> None:
        self._in_a_row: int | None = None  # None until a step went well: at first the scale seeks its size

    def applied(self) -> None:
        """A step was applied at the present scale."""
        self._in_a_row = 0

    def why(self, at_lowest: bool) -> Literal["overflow", "gradient"]:
        """Why a step with a finite loss was not applied. at_lowest: whether it was made at the lowest loss scale."""
        if self._in_a_row is not None:
            self._in_a_row += 1
        if at_lowest or (self._in_a_row or 0) > self.MOST_IN_A_ROW:
            return "gradient"
        return "overflow"


class Tally:
    """The sums of one step: this rank's, then all ranks'. One all-reduce in float64; counts up to 2^53 stay exact."""

    def __init__(self, args: ModelArgs, n_targets: int, n_tokens: int, world: World) -> None:
        """n_targets, n_tokens: of all ranks."""
        self.n_targets, self.n_tokens = n_targets, n_tokens
        self._world = world
        self._shape = routing_shape(args)
        self._sums = torch.zeros(3 + math.prod(self._shape), dtype=torch.float64, device=world.device)
        self._counts = self._sums[3:].view(self._shape)
        self.counts: Tensor | None = None
        """(M, E) int64 on the host, of all ranks; after `result`."""

    def add_loss(self, loss_sum: Tensor) -> None:
        """Sum of a micro-batch's negative log-likelihood."""
        self._sums[0] += loss_sum.detach().double()

    def add_routing(self, balance_sum: Tensor, z_sum: Tensor, counts_mE: Tensor, first: int = 0) -> None:
        """A micro-batch's sums of the router's losses, and its expert counts in MoE layers from the `first` on."""
        self._sums[1] += balance_sum.detach().double()
        self._sums[2] += z_sum.detach().double()
        self._counts[first : first + len(counts_mE)] += counts_mE

    def sum_over_ranks(self) -> None:
        """From now on the sums are those of all ranks (collective)."""
        if self._world.size > 1:
            dist.all_reduce(self._sums)

    def one_or_nan(self, loss_limit: float | None) -> Tensor:
        """1 where the step is to be applied, else NaN; float32 scalar on the device."""
        sums = self._sums
        loss = sums[0] / max(self.n_targets, 1) + (sums[1] + sums[2]) / self.n_tokens
        good = loss.isfinite() if loss_limit is None else loss <= loss_limit
        return torch.where(good, 1.0, math.nan).float()

    def result(self, grad_norm: float, expert_ranks: int) -> StepResult:
        """The step's numbers, once the ranks' sums are there; waits for the device."""
        numbers = self._sums.tolist()
        lm, balance, z = numbers[0] / max(self.n_targets, 1), numbers[1] / self.n_tokens, numbers[2] / self.n_tokens
        result = StepResult(
            loss=lm + balance + z,
            lm_loss=lm,
            moe_balance_loss=balance,
            moe_z_loss=z,
            grad_norm=grad_norm,
            n_targets=self.n_targets,
            n_tokens=self.n_tokens,
            routing_checksum=None,
        )
        if self._counts.numel():
            self.counts = torch.tensor(numbers[3:], dtype=torch.int64).view(self._shape)
            result.routing_checksum = zlib.crc32(self.counts.numpy().tobytes())
            result.expert_load = highest_share(self.counts)
            result.expert_rank_load = highest_share(self.counts.unflatten(1, (expert_ranks, -1)).sum(-1))
        return result


@dataclass
class Step:
    """A step on its way, as its schedule sees it: what is computed, and what has come of it."""

    batch: StepBatch
    tally: Tally
    data_ranks: int
    reports_loss: bool
    """Whether this rank's losses count: its tensor-parallel peers have the same ones, but other tokens' routing."""
    loss_limit: float | None
    """No update where the loss is above it."""
    before_change: Callable[[], object]
    """To be called before masters or optimizer state change."""
    losses: list[Tensor] = field(default_factory=list)
    """Of this rank's micro-batches, as they were handed to DeepSpeed; a stage without the output has none."""

    def loss(self, out: TransformerOutput, first_moe_layer: int = 0) -> Tensor | None:
        """Take a micro-batch's results into the sums; what of the loss depends on them, in this step's own weights, or
        None where nothing does. `first_moe_layer`: the number of the first MoE layer that it went through.

        DeepSpeed averages gradients over the data-parallel ranks, so every sum is multiplied by their number.
        """
        loss: Tensor | None = None
        if out.loss_sum is not None:
            if self.reports_loss:
                self.tally.add_loss(out.loss_sum)
            loss = out.loss_sum * (self.data_ranks / max(self.tally.n_targets, 1))
        if out.balance_sum is not None and out.z_sum is not None and out.expert_counts is not None:
            self.tally.add_routing(out.balance_sum, out.z_sum, out.expert_counts, first_moe_layer)
            auxiliary = (out.balance_sum + out.z_sum) * (self.data_ranks / self.tally.n_tokens)
            loss = auxiliary if loss is None else loss + auxiliary
        if out.loss_sum is not None and loss is not None:
            self.losses.append(loss.detach())
        return loss

    def one_or_nan(self) -> Tensor:
        """1 where the step is to be applied, else NaN, once the sums are those of all ranks."""
        return self.tally.one_or_nan(self.loss_limit)


def highest_share(counts_MX: Tensor) -> float:
    """Largest count of a row over the row's mean, over all rows."""
    return float((counts_MX.amax(1) / counts_MX.double().mean(1).clamp(min=1e-9)).max())
