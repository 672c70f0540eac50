"""Bytes that ranks send each other: what that means, and an instrument that counts them in a running job.

A collective over n ranks sends, summed over its ranks, what a ring does (Patarasuk and Yuan 2009, "Bandwidth optimal
all-reduce algorithms for clusters of workstations"), S being the bytes of its whole buffer:

    all-reduce 2 (n-1) S;  all-gather, reduce-scatter, broadcast, reduce (n-1) S;
    all-to-all (n-1)/n of the buffers of all its ranks, as if every rank sent equally much to each.

What one rank sends to another, from stage to stage of a pipeline, is the bytes of its buffer.

So groups of one rank send nothing. Libraries may choose other algorithms, and the rows that an expert-parallel rank
keeps for itself depend on the routing; this number depends on neither. llm/plan/traffic.py predicts it.
"""

from collections import Counter
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llm.parallel.collectives import sum_over_ranks
from llm.parallel.launch.world import World
from llm.parallel.layout import Dimension, Layout

Along = Dimension | Literal["world"]
_ORDER: tuple[Along, ...] = (
    "tensor", "data", "reduce", "expert_data", "expert", "context", "pipeline", "replica", "world"
)  # fmt: skip

# operation -> (argument that holds the whole buffer, times it is sent to each other rank)
_RING: dict[str, tuple[int, int]] = {
    "allreduce_": (0, 2),
    "allreduce_coalesced_": (0, 2),
    "_allgather_base_": (0, 1),
    "allgather_": (0, 1),
    "allgather_coalesced_": (0, 1),
    "allgather_into_tensor_coalesced_": (0, 1),
    "_reduce_scatter_base_": (1, 1),
    "reduce_scatter_": (1, 1),
    "reduce_scatter_tensor_coalesced_": (1, 1),
    "alltoall_base_": (1, 1),
    "alltoall_": (1, 1),
    "broadcast_": (0, 1),
    "reduce_": (0, 1),
}
_SILENT = ("barrier", "monitored_barrier_", "check_for_nan")


def dimension_names(layout: Layout) -> dict[Along, Along]:
    """What each dimension is called in a count: where two have the same groups of ranks, such as data and world without
    tensor parallelism, the first of them in a fixed order stands for both.
    """
    names: dict[frozenset[tuple[int, ...]], Along] = {}
    return {along: names.setdefault(frozenset(groups_of(layout, along)), along) for along in _ORDER}


def size_of(layout: Layout, along: Along) -> int:
    """Ranks of a group along a dimension."""
    return layout.world if along == "world" else layout.size(along)


def groups_of(layout: Layout, along: Along) -> list[tuple[int, ...]]:
    """The groups of ranks along a dimension."""
    if along == "world":
        return [tuple(range(layout.world))]
    return [tuple(ranks) for ranks in layout.groups(along)]


class TrafficCounter(TorchDispatchMode):
    """Counts what this rank sends while it is entered: in forwards, in backwards, and inside DeepSpeed alike.

    Raises NotImplementedError at a collective that it has no rule for, and ValueError at one over ranks that are no
    group of the layout.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self.calls: Counter[Along] = Counter()
        """Collectives of this rank, by dimension; groups of one rank left out."""
        self._sent: Counter[Along] = Counter()  # as if all ranks of its groups had this rank's buffers
        self._sends = 0  # between stages, by this rank alone
        self._along: dict[tuple[int, ...], Along] = {}
        for along in _ORDER:
            for ranks in groups_of(layout, along):
                self._along.setdefault(ranks, along)

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Without this, compiled blocks would quietly run uncompiled."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self._count(func.namespace, func._schema.name.split("::")[1], args)
        return func(*args, **(kwargs or {}))

    def _count(self, namespace: str, operation: str, args: Any) -> None:
        if operation in _SILENT:
            return
        if operation == "recv_":
            return
        if operation == "send":
            self._sends += sum(leaf.nbytes for leaf in tree_leaves(args[0]) if isinstance(leaf, Tensor))
            return
        if namespace != "c10d" or operation not in _RING:
            raise NotImplementedError(f"no rule for the bytes of {namespace}::{operation}")
        ranks = _ranks(args)
        if len(ranks) == 1:
            return
        if ranks not in self._along:
            raise ValueError(f"{operation} over the ranks {ranks}, which are no group of the layout")
        # whatever other groups have the same ranks, tokens go to experts
        along: Along = "expert" if operation.startswith("alltoall") else self._along[ranks]
        argument, times = _RING[operation]
        tensors = [leaf for leaf in tree_leaves(args[argument]) if isinstance(leaf, Tensor)]
        self.calls[along] += 1
        self._sent[along] += times * (len(ranks) - 1) * sum(tensor.nbytes for tensor in tensors)

    def total(self, world: World) -> dict[Along, int]:
        """Bytes sent by all ranks together, by dimension (collective)."""
        *sums, sends = sum_over_ranks([*(float(self._sent[along]) for along in _ORDER), float(self._sends)], world)
        sent = {along: int(bytes_) // size_of(self.layout, along) for along, bytes_ in zip(_ORDER, sums, strict=True)}
        sent[dimension_names(self.layout)["pipeline"]] += int(sends)
        return {along: bytes_ for along, bytes_ in sent.items() if bytes_}


def _ranks(args: Any) -> tuple[int, ...]:
    for arg in args:
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
            return tuple(sorted(dist.get_process_group_ranks(dist.ProcessGroup.unbox(arg))))
    raise ValueError("a collective without a process group")
