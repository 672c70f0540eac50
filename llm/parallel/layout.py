"""How the ranks of a job share the work: the grid of ranks, as plain numbers.

A rank's coordinates are (pipeline, data, context, tensor), the last one innermost, so that tensor-parallel ranks are
neighbours on one machine. Expert parallelism cuts the data-parallel ranks: neighbouring ones hold different experts.
A replica is the ranks that together hold the model once, with all its stages. Gradients are summed over the ranks
that differ in data or context: `reduce`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal, NamedTuple

Dimension = Literal["pipeline", "data", "context", "tensor", "expert", "expert_data", "reduce", "replica"]
PipelineSchedule = Literal["1f1b", "dualpipev"]


class Place(NamedTuple):
    """Coordinates of a rank. `expert` and `expert_data` are the two halves of `data`."""

    pipeline: int
    data: int
    context: int
    tensor: int
    expert: int
    expert_data: int


@dataclass(frozen=True)
class Layout:
    """Numbers of ranks; the data-parallel ones are what is left of the world."""

    world: int
    tensor: int = 1
    expert: int = 1
    pipeline: int = 1
    context: int = 1
    zero_stage: int = 1
    sequence_parallel: bool = True
    """Cut the activations between tensor-parallel regions along the sequence."""
    pipeline_schedule: PipelineSchedule = "1f1b"
    """In which order a pipeline's ranks do forwards and backwards, and by that which stages they hold."""

    @property
    def data(self) -> int:
        return self.world // (self.tensor * self.pipeline * self.context)

    @property
    def stages(self) -> int:
        """Parts that the layers are cut into."""
        return self.pipeline * (2 if self.pipeline_schedule == "dualpipev" else 1)

    def stages_of(self, pipeline_rank: int) -> tuple[int, ...]:
        """The stages that a place of a pipeline holds, in the order of the model: one, or with dualpipev one on the way
        from the first place to the last and one on the way back.
        """
        return tuple(stage for stage in range(self.stages) if self.holder(stage) == pipeline_rank)

    def holder(self, stage: int) -> int:
        """The place of a pipeline that holds a stage."""
        return min(stage, self.stages - 1 - stage) if self.pipeline_schedule == "dualpipev" else stage

    def __str__(self) -> str:
        sizes = {"tensor": self.tensor, "pipeline": self.pipeline, "context": self.context}
        cut = [f"{name} {size}" for name, size in sizes.items() if size > 1]
        if self.expert > 1:
            cut.append(f"expert {self.expert} of the data ranks")
        if self.tensor > 1:
            cut.append(f"sequence {'cut' if self.sequence_parallel else 'whole'}")
        if self.pipeline_schedule != "1f1b":
            cut.append(self.pipeline_schedule)
        return ", ".join([f"data {self.data}", *cut, f"ZeRO-{self.zero_stage}"])

    def size(self, dimension: Dimension) -> int:
        """Number of ranks of a group along `dimension`."""
        if dimension == "replica":
            return self.pipeline * self.context * self.tensor
        if dimension == "reduce":
            return self.data * self.context
        return self.data // self.expert if dimension == "expert_data" else int(getattr(self, dimension))

    def place(self, rank: int) -> Place:
        """Coordinates of a rank."""
        rest, tensor = divmod(rank, self.tensor)
        rest, context = divmod(rest, self.context)
        pipeline, data = divmod(rest, self.data)
        return Place(pipeline, data, context, tensor, data % self.expert, data // self.expert)

    def rank(self, pipeline: int, data: int, context: int, tensor: int) -> int:
        """The rank at these coordinates."""
        return ((pipeline * self.data + data) * self.context + context) * self.tensor + tensor

    def groups(self, dimension: Dimension) -> Iterator[list[int]]:
        """The groups of ranks along a dimension, together every rank once."""
        if dimension in ("expert", "expert_data"):
            for pipeline, context, tensor in product(range(self.pipeline), range(self.context), range(self.tensor)):
                data = range(self.data)
                blocks = (
                    [list(data[i : i + self.expert]) for i in range(0, self.data, self.expert)]
                    if dimension == "expert"
                    else [list(data[i :: self.expert]) for i in range(self.expert)]
                )
                for block in blocks:
                    yield [self.rank(pipeline, d, context, tensor) for d in block]
            return
        if dimension == "replica":
            inside = list(product(range(self.pipeline), range(self.context), range(self.tensor)))
            for d in range(self.data):
                yield [self.rank(pipeline, d, context, tensor) for pipeline, context, tensor in inside]
            return
        if dimension == "reduce":
            summed = list(product(range(self.data), range(self.context)))
            for pipeline, tensor in product(range(self.pipeline), range(self.tensor)):
                yield [self.rank(pipeline, d, context, tensor) for d, context in summed]
            return
        sizes = {"pipeline": self.pipeline, "data": self.data, "context": self.context, "tensor": self.tensor}
        others = {name: range(size) for name, size in sizes.items() if name != dimension}
        for values in product(*others.values()):
            fixed = dict(zip(others, values, strict=True))
            yield [self.rank(**{**fixed, dimension: i}) for i in range(sizes[dimension])]
