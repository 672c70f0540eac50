"""Bytes that a rank keeps for good, predicted from the numbers of a run alone: weights, masters, optimizer state,
averages, and gradients between micro-batches. Exact, with DeepSpeed's padding.

Not in it: activations, buffers of collectives, one step's temporary copies, and what lies beside tensors.
"""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from itertools import accumulate

from llm.plan.workload import BYTES, OptimizerGroup, RankKind, Workload

FLOAT32 = 4
STEP_COUNT = 4
"""AdamW counts its steps in a float32 number for each tensor that it steps on."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    parameters: int
    """As the forward reads them; under ZeRO-3 this rank's shares, and what stays gathered."""
    int8: int
    """Frozen weights in one byte a value, with their scales."""
    masters: int
    """Float32 weights that the optimizer steps on; 0 where these are the parameters themselves."""
    optimizer: int
    """Moments or momentum."""
    ema: int
    """The moving average of the weights."""
    gradients: int | None
    """Float32 gradients that are kept until the step while micro-batches follow: whole ones below ZeRO-2, then those of
    this rank's share. Under ZeRO-2 in fp32, whole ones of all parameters that the share touches, twice of one that no
    backward reaches, and this is the most that any rank has. Not known with an offloaded optimizer.
    """

    @property
    def total(self) -> int:
        return self.parameters + self.int8 + self.masters + self.optimizer + self.ema + (self.gradients or 0)


def in_host_memory(work: Workload, kept: Memory) -> int:
    """Bytes of these that lie in the memory of the rank's machine: what an offloaded optimizer steps on and keeps."""
    return kept.masters + kept.optimizer + kept.ema if work.offload_optimizer else 0


def predict(work: Workload) -> list[tuple[Memory, int]]:
    """Memory of each kind of rank, and how many ranks are of that kind."""
    rest = work.layout.world // (work.layout.tensor * work.layout.pipeline)
    return [(_of(work, kind), kind.ranks * rest) for kind in work.kinds]


def checkpoint_bytes(work: Workload) -> int:
    """Bytes of the values in a checkpoint, which all ranks write together: masters, optimizer state and averages, each
    element once. Headers and the manifest come on top.
    """
    kept, table = {"adamw": 3, "muon": 2, "sgd": 1}, work.table
    return FLOAT32 * sum(
        (kept[group.algorithm] + work.ema) * sum(table[name].numel for name in group.names) for group in work.groups
    )


def _of(work: Workload, kind: RankKind) -> Memory:
    flats = {group: _flat_tensors(work, group, kind) for group in work.groups}
    own = sum(sum(sizes) for sizes in flats.values())
    whole = sum(work.flat_numel(group, kind) for group in work.groups)
    width = BYTES[work.precision]
    if work.stage == 3:
        stay = [n for n in kind.sizes.values() if work.stays_gathered(n)] if work.layout.data > 1 else []
        gathered = sum(work.layout.data * work.share_numel(numel) for numel in stay)
        parameters = width * (own + sum(map(work.share_numel, work.frozen(kind).values())) + gathered)
    else:
        frozen = sum(work.frozen(kind).values())
        trained = whole if work.stage else sum(kind.sizes.values()) - frozen
        parameters = width * (trained + frozen + kind.copied)
    return Memory(
        parameters=parameters,
        int8=sum(kind.int8) + FLOAT32 * kind.int8_scales,
        masters=FLOAT32 * own if work.stage else 0,
        optimizer=sum(_state(group, sizes) for group, sizes in flats.items()),
        ema=FLOAT32 * own if work.ema else 0,
        gradients=_gradients(work, kind, own, whole),
    )


def _flat_tensors(work: Workload, group: OptimizerGroup, kind: RankKind) -> list[int]:
    """Elements of the tensors that the optimizer steps on."""
    if work.stage == 0:
        return [kind.sizes[name] for name in group.names]
    if work.stage == 3:
        return work.sub_groups(group, kind)
    return [work.flat_numel(group, kind) // work.cut_over(group)]


def _state(group: OptimizerGroup, sizes: list[int]) -> int:
    if group.algorithm == "adamw":
        return sum(2 * FLOAT32 * size + STEP_COUNT for size in sizes)
    return FLOAT32 * sum(sizes) if group.algorithm == "muon" else 0


def _gradients(work: Workload, kind: RankKind, own: int, whole: int) -> int | None:
    if work.offload_optimizer:
        return None
    copied = kind.copied_gradients if work.head_gradients else 0
    if work.keeps_float32_gradients:
        return FLOAT32 * (whole + copied)
    if work.stage < 2:
        return FLOAT32 * (work.reached(kind) + copied)
    if work.stage == 2 and work.precision == "fp32":
        return FLOAT32 * max(map(sum, zip(*(_touched(work, group, kind) for group in work.groups), strict=True)))
    return FLOAT32 * own


def _touched(work: Workload, group: OptimizerGroup, kind: RankKind) -> list[int]:
    """For each data-parallel rank the elements that are kept for the parameters that its share of a flat group touches:
    room for each in one buffer, beside which DeepSpeed keeps zeros for one without a gradient.
    """
    ranks = work.cut_over(group)
    share = work.flat_numel(group, kind) // ranks
    ends = list(accumulate((kind.sizes[name] for name in group.names), initial=0))
    times = (1 if work.has_gradient(name) else 2 for name in group.names)
    kept = list(accumulate((n * kind.sizes[name] for n, name in zip(times, group.names, strict=True)), initial=0))
    found = []
    for rank in range(work.layout.data):
        start = rank // (work.layout.data // ranks) * share
        first, last = bisect_right(ends, start) - 1, bisect_left(ends, start + share)
        found.append(kept[min(last, len(ends) - 1)] - kept[min(first, len(ends) - 1)])
    return found
