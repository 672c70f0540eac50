"""What an optimizer step was made of, summed over micro-batches and ranks.

Shapes: M number of MoE layers of the whole model, m those of a stage, E experts.
"""

import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from llm.args import ModelArgs
from llm.batch import Batch, Counts, Rows
from llm.data.batch import StepBatch
from llm.datatypes import ROUTE_NUMBERS, RouteCounts, RouterStats, TransformerOutput
from llm.layers.dropout import token_keys
from llm.layers.moe import routing_shape
from llm.objectives import Objectives, measured_as
from llm.parallel.grid import Grid
from llm.parallel.launch.world import World

Number = TypeVar("Number", float, Tensor)
Skipped = Literal["loss", "gradient", "limit", "overflow", "passed over"]


@dataclass
class StepResult:
    """What one optimizer step was made of; every number is global and equal on all ranks. Losses in nats."""

    loss: float
    """The sum of `losses`."""
    losses: dict[str, float]
    """Mean of each objective times its weight."""
    source_losses: dict[str, float]
    """Mean of the source's own main objective over its targets, NaN where the step had none; empty where there is one
    source only."""
    grad_norm: float
    """Before clipping; inf where the step was not applied."""
    counts: Counts
    routing_checksum: int | None
    """CRC-32 of how many tokens each expert of each layer got: equal on two layouts only if every routing decision
    is.
    """
    expert_load: float | None = None
    """Most tokens that chose an expert of any layer, over an even share. Without a capacity all were served."""
    expert_rank_load: float | None = None
    """The same of the ranks that experts lie on: how much longer the slowest one works; 1 where all have all experts.
    """
    expert_counts: Tensor | None = None
    """(M, E) int64 on the host: how many tokens each expert of each MoE layer got."""
    moe_overflow: float | None = None
    """Share of all assignments to experts that found theirs full; None where experts have no capacity."""
    routes: dict[int, RouteCounts] = field(default_factory=dict)
    """Of routed layers, by their numbers."""
    loss_scale: float | None = None
    """Of fp16."""
    skipped: Skipped | None = None
    """Why weights and optimizer state were left as they were: the loss or a gradient was not finite, the loss was above
    its limit, fp16 overflowed and lowers its loss scale, which is part of its work, or the step was not to be made. In
    fp16 a gradient counts as not finite where no lower scale would help; see `Overflows`."""
    measures: dict[str, float] = field(default_factory=dict)
    """What objectives say besides their losses, as OBJECTIVE_MEASURE: means over the objective's count, NaN where the
    step had no target."""
    culprits: list[str] = field(default_factory=list)
    """Where the loss or gradient was not finite: rank, rows of the data order, losses of its micro-batches."""

    @classmethod
    def passed_over(cls, counts: Counts, measures: Iterable[str] = ()) -> "StepResult":
        """A step that was not computed: its losses and measures are NaN."""
        losses, of_sources, measured = (
            dict.fromkeys(names, math.nan) for names in (counts.objectives, counts.sources, measures)
        )
        return cls(math.nan, losses, of_sources, math.inf, counts, None, skipped="passed over", measures=measured)


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

    def __init__(self, args: ModelArgs, objectives: Objectives, counts: Counts, world: World) -> None:
        """counts: of all ranks."""
        self.step_counts = counts
        self._weights, self._measured = objectives.weights, objectives.measured
        self._world = world
        routing = routing_shape(args)
        bounded = args.moe is not None and args.moe.capacity is not None
        self._routes = [spec.index for spec in args.layer_specs() if spec.mixer.name == "routed"]
        of_routes = len(self._routes) * ROUTE_NUMBERS
        named = len(self._weights), len(self._measured), len(counts.sources)
        self._sizes = *named, math.prod(routing), int(bounded), of_routes
        self._sums = torch.zeros(sum(self._sizes), dtype=torch.float64, device=world.device)
        losses, measures, self._sources, routed, self._rejected, route_numbers = self._sums.split(self._sizes)
        self._of_route = dict(zip(self._routes, route_numbers.split(ROUTE_NUMBERS), strict=True)) if of_routes else {}
        self._losses = dict(zip(self._weights, losses.unbind(), strict=True))
        self._measures = dict(zip(self._measured, measures.unbind(), strict=True))
        self._routed = routed.view(routing)
        self.counts: Tensor | None = None
        """(M, E) int64 on the host, of all ranks; after `result`."""

    def weighted(self, name: str, loss_sum: Tensor, ranks: int) -> Tensor:
        """What a sum of a micro-batch is of the step's loss; `ranks` times that, as gradients are averaged over them.
        """
        return loss_sum * (self._weights[name] * ranks / (self.step_counts.objectives[name] or 1))

    def add_loss(self, name: str, loss_sum: Tensor) -> None:
        """An objective's sum over a micro-batch."""
        self._losses[name] += loss_sum.detach().double()

    def add_measures(self, name: str, sums: Mapping[str, Tensor] | None) -> None:
        """What an objective says besides of a micro-batch."""
        for measure, value in (sums or {}).items():
            self._measures[measured_as(name, measure)] += value.double()

    def add_by_source(self, per_token_BT: Tensor | None, rows: Rows | None) -> None:
        """A main objective's part of each token of a micro-batch, whose rows are these."""
        if not len(self._sources) or per_token_BT is None or rows is None:
            return
        sums_R = per_token_BT.view(len(rows.source), -1).sum(1, dtype=torch.float64)
        source = torch.from_numpy(rows.source).to(sums_R.device)
        self._sources.index_add_(0, source.clamp(min=0), sums_R)  # a row that is not there adds nothing

    def add_routing(self, stats: RouterStats, first: int = 0) -> None:
        """A micro-batch's expert counts in MoE layers from the `first` on."""
        self._routed[first : first + len(stats.expert_counts)] += stats.expert_counts
        if stats.rejected is not None:
            self._rejected += stats.rejected

    def add_routes(self, routes: Mapping[int, RouteCounts]) -> None:
        """What routed layers report of a micro-batch."""
        for layer, counts in routes.items():
            self._of_route[layer] += counts.numbers

    def sum_over_ranks(self) -> None:
        """From now on the sums are those of all ranks (collective)."""
        if self._world.size > 1:
            dist.all_reduce(self._sums)

    def one_or_nan(self, loss_limit: float | None) -> Tensor:
        """1 where the step is to be applied, else NaN; float32 scalar on the device."""
        loss = sum(self._mean(name, loss_sum) for name, loss_sum in self._losses.items())
        assert isinstance(loss, Tensor)
        good = loss.isfinite() if loss_limit is None else loss <= loss_limit
        return torch.where(good, 1.0, math.nan).float()

    def _mean(self, name: str, loss_sum: Number) -> Number:
        """An objective's part of the step's loss."""
        return loss_sum / (self.step_counts.objectives[name] or 1) * self._weights[name]

    def result(self, grad_norm: float, expert_ranks: int) -> StepResult:
        """The step's numbers, once the ranks' sums are there; waits for the device."""
        numbers = self._sums.tolist()
        ends = np.cumsum(self._sizes)[:-1]
        sums, measured, of_sources, routed, rejected, of_routes = (part.tolist() for part in np.split(numbers, ends))
        losses = {name: self._mean(name, value) for name, value in zip(self._weights, sums, strict=True)}
        counts = [self.step_counts.objectives[objective] for objective in self._measured.values()]
        sources = self.step_counts.sources
        result = StepResult(
            loss=sum(losses.values()),
            losses=losses,
            source_losses=dict(zip(sources, map(_mean_of, of_sources, sources.values()), strict=True)),
            measures=dict(zip(self._measured, map(_mean_of, measured, counts), strict=True)),
            grad_norm=grad_norm,
            counts=self.step_counts,
            routing_checksum=None,
        )
        for i, layer in enumerate(self._routes):
            row = of_routes[i * ROUTE_NUMBERS : (i + 1) * ROUTE_NUMBERS]
            result.routes[layer] = RouteCounts(torch.tensor(row, dtype=torch.float64))
        if self._routed.numel():
            self.counts = torch.tensor(routed, dtype=torch.int64).view(self._routed.shape)
            result.expert_counts = self.counts
            result.routing_checksum = zlib.crc32(self.counts.numpy().tobytes())
            result.expert_load = highest_share(self.counts)
            result.expert_rank_load = highest_share(self.counts.unflatten(1, (expert_ranks, -1)).sum(-1))
            if rejected:  # both are counts, exact below 2^53
                result.moe_overflow = rejected[0] / max(1, int(self.counts.sum()))
        return result


@dataclass
class Step:
    """A step on its way, as its schedule sees it: what is computed, and what has come of it."""

    batch: StepBatch
    objectives: Objectives
    tally: Tally
    grid: Grid
    loss_limit: float | None
    """No update where the loss is above it."""
    before_change: Callable[[], object]
    """To be called before masters or optimizer state change."""
    dropout_key: tuple[int, int] | None = None
    """Seed of the run and number of the step, where the model has dropout."""
    losses: list[Tensor] = field(default_factory=list)
    """Of this rank's micro-batches, as they were handed to DeepSpeed; a stage without the output has none."""

    def with_keys(self, batch: Batch) -> Batch:
        """A micro-batch on the model's device, with the keys by which dropout chooses where the model has any.
        ValueError where it is not known which rows it holds.
        """
        if self.dropout_key is None:
            return batch
        if batch.rows is None:
            raise ValueError("dropout chooses by the number of a row in the order of the data, and a batch has none")
        rows_R = torch.from_numpy(batch.rows.global_row).to(batch.inputs.tokens.device)
        return replace(batch, keys_N=token_keys(*self.dropout_key, rows_R, batch.n_tokens))

    def loss(self, out: TransformerOutput, batch: Batch, first_moe_layer: int = 0) -> Tensor | None:
        """Take a micro-batch's results into the sums; what of the loss depends on them, in this step's own weights, or
        None where nothing does. `first_moe_layer`: the number of the first MoE layer that it went through.

        DeepSpeed averages gradients over the data-parallel ranks, so every sum is multiplied by their number.
        """
        tally, ranks = self.tally, self.grid.reduce.size
        sums = {name: found.total for name, found in (out.losses or {}).items()}
        if out.losses and self.grid.reports_loss:  # its tensor-parallel peers have the same, but other tokens' routing
            for name, loss_sum in sums.items():
                tally.add_loss(name, loss_sum)
                tally.add_measures(name, out.losses[name].measures)
            for objective in self.objectives.of_tokens:
                tally.add_by_source(out.losses[objective.name].per_token, batch.rows)
        if out.router is not None:
            of_layers = self.objectives.layer_sums(out.router)
            for name, loss_sum in of_layers.items():
                tally.add_loss(name, loss_sum)
            tally.add_routing(out.router, first_moe_layer)
            sums |= of_layers
        tally.add_routes(out.routes or {})
        if not sums:
            return None
        first, *others = (tally.weighted(name, loss_sum, ranks) for name, loss_sum in sums.items())
        loss = sum(others, first)
        if out.losses:
            self.losses.append(loss.detach())
        return loss

    def one_or_nan(self) -> Tensor:
        """1 where the step is to be applied, else NaN, once the sums are those of all ranks."""
        return self.tally.one_or_nan(self.loss_limit)


def _mean_of(total: float, count: float) -> float:
    return total / count if count else math.nan


def highest_share(counts_MX: Tensor) -> float:
    """Largest count of a row over the row's mean, over all rows."""
    return float((counts_MX.amax(1) / counts_MX.double().mean(1).clamp(min=1e-9)).max())
