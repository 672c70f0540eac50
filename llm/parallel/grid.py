"""The process groups of a layout: made here, and handed from here to fairscale and DeepSpeed, so that all agree."""

from dataclasses import dataclass
from functools import cache, cached_property

import torch.distributed as dist

from llm.boxes import Box
from llm.layers.parameter import ParamInfo
from llm.parallel.launch.process import name_roles
from llm.parallel.launch.world import World
from llm.parallel.layout import Dimension, Layout, Place


@dataclass(frozen=True)
class Group:
    """The ranks along one dimension that this rank belongs to."""

    ranks: tuple[int, ...]
    rank: int
    """This process's number among them."""
    handle: dist.ProcessGroup | None
    """None in a job of one process."""

    @property
    def size(self) -> int:
        return len(self.ranks)


@dataclass(frozen=True)
class Grid:
    """This process's place in a layout, and its groups."""

    world: World
    layout: Layout
    tensor: Group
    rows: Group
    """Ranks that read other rows of the data."""
    context: Group
    """Ranks that have other parts of the same rows; of one rank for now."""
    reduce: Group
    """Rows times context: the ranks over which gradients are summed, and ZeRO cuts."""
    expert: Group
    """Ranks that hold different experts of a layer, with the same tensor coordinate."""
    expert_data: Group
    """Ranks that hold the same experts, over which their gradients are summed."""
    pipeline: Group
    """Ranks that hold the stages of the model one after the other, with the same other coordinates."""
    replica: Group
    """Ranks that together hold the model once: all stages and all their tensor-parallel ranks."""

    @cached_property
    def place(self) -> Place:
        return self.layout.place(self.world.rank)

    @property
    def reports_loss(self) -> bool:
        """Whether this rank counts for what all ranks of its replica have alike or only the last stage has, such as the
        loss of a batch."""
        return self.leads and self.pipeline.rank == self.layout.holder(self.layout.stages - 1)

    @property
    def leads(self) -> bool:
        """Whether this rank counts for what all ranks of its tensor group have alike, such as a whole parameter."""
        return self.tensor.rank == 0

    def box(self, row: ParamInfo) -> Box:
        """The box of a parameter that this rank holds."""
        return row.box((self.tensor.rank, self.tensor.size), (self.expert.rank, self.expert.size))


def make_grid(world: World, layout: Layout | None = None) -> Grid:
    """Create the groups of `layout`, by default all ranks data-parallel (collective)."""
    layout = layout or Layout(world.size)
    if layout.world != world.size:
        raise ValueError(f"the layout is for {layout.world} ranks, the job has {world.size}")
    grid = Grid(world, layout, **{name: _group(layout, along, world) for name, along in _GROUPS.items()})
    if layout.tensor > 1:
        _set_fairscale(grid)
    if layout.pipeline > 1:
        held = [layout.stages_of(layout.place(rank).pipeline) for rank in range(world.size)]
        name_roles({rank: stage_name(layout, *stages) for rank, stages in enumerate(held)})
    return grid


def stage_name(layout: Layout, *numbers: int) -> str:
    """How stages are named for people."""
    named = " and ".join(str(number + 1) for number in numbers)
    return f"stage{'s' if len(numbers) > 1 else ''} {named} of {layout.stages}"


_GROUPS: dict[str, Dimension] = {
    "tensor": "tensor",
    "rows": "data",
    "context": "context",
    "reduce": "reduce",
    "expert": "expert",
    "expert_data": "expert_data",
    "pipeline": "pipeline",
    "replica": "replica",
}
"""Of a Grid, and the dimension along which each lies."""


def _group(layout: Layout, dimension: Dimension, world: World) -> Group:
    mine = None
    data_parallel_only = layout.data == world.size and layout.expert == 1
    for ranks in layout.groups(dimension):
        handle = None
        if len(ranks) == world.size:
            handle = dist.group.WORLD if world.size > 1 else None
        elif not data_parallel_only and (dimension != "context" or len(ranks) > 1):
            handle = _made_group(tuple(ranks))  # by every rank, in the same order; of one rank too, for DeepSpeed
        if world.rank in ranks:
            mine = Group(tuple(ranks), ranks.index(world.rank), handle)
    assert mine is not None
    return mine


@cache
def _made_group(ranks: tuple[int, ...]) -> dist.ProcessGroup:
    """One group of these ranks in the life of the process, as each has connections and threads of its own."""
    return dist.new_group(list(ranks))


def _set_fairscale(grid: Grid) -> None:
    """Set the groups that fairscale's mappings use: its own initialiser orders ranks another way once there are
    pipelines.
    """
    from fairscale.nn.model_parallel import initialize

    initialize._MODEL_PARALLEL_GROUP = grid.tensor.handle
    initialize._DATA_PARALLEL_GROUP = grid.reduce.handle


class DeepSpeedGroups:
    """The grid as DeepSpeed's `mpu`: model parallel means tensor parallel; it knows nothing of sequence parallelism,
    for which it would scale gradients."""

    def __init__(self, grid: Grid) -> None:
        self._tensor, self._data = grid.tensor, grid.reduce

    def get_model_parallel_rank(self) -> int:
        return self._tensor.rank

    def get_model_parallel_world_size(self) -> int:
        return self._tensor.size

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self._tensor.handle

    def get_data_parallel_rank(self) -> int:
        return self._data.rank

    def get_data_parallel_world_size(self) -> int:
        return self._data.size

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self._data.handle

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group
