"""Who made a step not finite: the ranks and rows of a bad loss or gradient, in words.

A bad gradient spreads: the backward brings it from the stage where it arose to every stage before, and the sum over
data-parallel ranks to all of them. So each rank watches its own gradients, before any sum, and the last stage that
met one is named.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from llm.data.batch import StepBatch
from llm.parallel.collectives import gather_json
from llm.parallel.grid import Grid, stage_name
from llm.parallel.replica import Replica


class GradientProbes:
    """Watches, in each of this rank's stages, whether any gradient of a step is not finite, without waiting for the
    device.
    """

    def __init__(self, replica: Replica) -> None:
        self.stages = [stage.number for stage in replica.stages]
        self._sums = torch.zeros(len(self.stages), device=replica.world.device)
        for name, parameter in replica.model.named_parameters():
            row = replica.table[name]
            if replica.grid.expert.size == 1 or row.expert_dim is None:  # else it is of other ranks' tokens too
                parameter.register_hook(partial(self._add, replica.stage_of(name)))

    def _add(self, stage: int, grad: Tensor) -> None:
        self._sums[stage].add_(grad.sum(dtype=torch.float32))

    def reset(self) -> None:
        """A step begins."""
        self._sums.zero_()

    def broken(self) -> list[int]:
        """Numbers of the stages that had a gradient that is not finite; waits for the device."""
        return [stage for stage, fine in zip(self.stages, self._sums.isfinite().tolist(), strict=True) if not fine]


def find_culprits(grid: Grid, probes: GradientProbes, batch: StepBatch, losses: Sequence[Tensor]) -> list[str]:
    """One line per rank, or group of tensor-parallel ranks, whose own loss or gradient was not finite; where none was,
    the sum over ranks was not (collective).

    losses: of this rank's micro-batches; an earlier stage of a pipeline has none.
    """
    group, data_rank, ranks = grid.tensor.ranks, grid.data.rank, grid.data.size
    who = f"rank {group[0]}" if len(group) == 1 else f"tensor-parallel ranks {', '.join(map(str, group))}"
    broken = probes.broken()
    stage = max(broken, default=probes.stages[-1])
    if grid.pipeline.size > 1:
        who = f"{who} ({stage_name(grid.layout, stage)})"
    micro_batches = len(batch.micro_batches)
    rows = batch.n_rows // (micro_batches * ranks)
    firsts = [batch.first_row + (m * ranks + data_rank) * rows for m in range(micro_batches)]
    mine = [
        f"{who}: loss of rows {first} to {first + rows - 1} is {float(loss)}"
        for first, loss in zip(firsts, losses, strict=False)
        if not bool(loss.isfinite())
    ]
    if not mine and broken:
        named = ", ".join(f"{first} to {first + rows - 1}" for first in firsts)
        mine.append(f"{who}: a gradient of rows {named} is not finite")
    gathered = [(at, lines) for at, lines in gather_json([stage, mine], grid.world) if lines]
    behind = max((at for at, _ in gathered), default=0)  # the backward brings it to every stage before
    found = list(dict.fromkeys(line for at, lines in gathered if at == behind for line in lines))
    losses_bad = [line for line in found if ": loss" in line]  # a bad loss poisons every rank's last backward
    return losses_bad or found or ["no rank alone: the sum of their gradients is not finite"]
