"""Who made a step not finite: the ranks and rows of a bad loss or gradient, in words.

The losses of a step are known. Its gradients are not any more: they are summed over ranks as they come. So a step with
a bad gradient is computed once more, with a hook on each parameter that looks at this rank's own gradients before any
sum. A bad gradient spreads: the backward brings it to every stage before the one where it arose. So the last stage that
met one is named.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from llm.data.batch import StepBatch
from llm.parallel.collectives import gather_json
from llm.parallel.engine.step import Step
from llm.parallel.grid import stage_name
from llm.parallel.replica import Replica


class GradientProbes:
    """Watches whether any gradient of a parameter is not finite, in each of this rank's stages."""

    def __init__(self, replica: Replica) -> None:
        self._stages = [stage.number for stage in replica.stages]
        self._sums = torch.zeros(len(self._stages), device=replica.world.device)
        self._hooks: list[RemovableHandle] = []
        for name, parameter in replica.model.named_parameters():
            alone = replica.grid.expert.size == 1 or replica.table[name].expert_dim is None
            if parameter.requires_grad and alone:  # else a gradient is of other ranks' tokens too
                self._hooks.append(parameter.register_hook(partial(self._add, replica.stage_of(name))))

    def _add(self, stage: int, grad: Tensor) -> None:
        self._sums[stage].add_(grad.sum(dtype=torch.float32))

    def remove(self) -> None:
        """Watch no longer."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def broken(self) -> list[int]:
        """Numbers of the stages that had a gradient that is not finite; waits for the device."""
        return [stage for stage, fine in zip(self._stages, self._sums.isfinite().tolist(), strict=True) if not fine]


@dataclass(kw_only=True)
class Rehearsal(Step):
    """A step that is computed to be looked at, and never applied."""

    probes: GradientProbes
    loss_limit: float | None = field(default=None, init=False)

    def one_or_nan(self) -> Tensor:
        """Not a number: what it makes of gradients is not to be seen, and keeps them from the weights."""
        self.probes.remove()
        return torch.full_like(self.tally.one_or_nan(None), torch.nan)


def find_culprits(
    replica: Replica, batch: StepBatch, losses: Sequence[Tensor], broken: Sequence[int] = ()
) -> list[str]:
    """One line per rank, or group of tensor-parallel ranks, whose own loss or gradient was not finite; where none was,
    the sum over ranks was not (collective).

    losses: of this rank's micro-batches; an earlier stage of a pipeline has none. broken: numbers of this rank's stages
    that had a gradient that was not finite.
    """
    grid = replica.grid
    group, data_rank, ranks = grid.tensor.ranks, grid.rows.rank, grid.rows.size
    who = f"rank {group[0]}" if len(group) == 1 else f"tensor-parallel ranks {', '.join(map(str, group))}"
    stage = max(broken, default=replica.stages[-1].number)
    if grid.pipeline.size > 1:
        who = f"{who} ({stage_name(grid.layout, stage)})"
    named_rows = [_named(batch, m, data_rank, ranks) for m in range(len(batch.micro_batches))]
    mine = [
        f"{who}: loss of rows {rows} is {float(loss)}"
        for rows, loss in zip(named_rows, losses, strict=False)
        if not bool(loss.isfinite())
    ]
    if not mine and broken:
        named = ", ".join(named_rows)
        mine.append(f"{who}: a gradient of rows {named} is not finite")
    gathered = [(at, lines) for at, lines in gather_json([stage, mine], grid.world) if lines]
    behind = max((at for at, _ in gathered), default=0)  # the backward brings it to every stage before
    found = list(dict.fromkeys(line for at, lines in gathered if at == behind for line in lines))
    losses_bad = [line for line in found if ": loss" in line]  # a bad loss poisons every rank's last backward
    return losses_bad or found or ["no rank alone: the sum of their gradients is not finite"]


def _named(batch: StepBatch, m: int, data_rank: int, ranks: int) -> str:
    """The rows of a micro-batch, in words: in the order of the data where the batch does not say."""
    rows = batch.micro_batches[m].rows
    if rows is not None and batch.tiles is not None:
        return ", ".join(map(str, rows.global_row.tolist()))
    size = batch.n_rows // (len(batch.micro_batches) * ranks)
    first = batch.first_row + (m * ranks + data_rank) * size
    return f"{first} to {first + size - 1}"
