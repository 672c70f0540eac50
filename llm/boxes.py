"""Parts of a parameter: which box of it tensor and expert parallelism leave on a rank, and how a box lies in the whole.

A box is a (start, stop) pair per dimension. Inside a box elements count row-major, as in a tensor of the box's shape;
ZeRO cuts that flat range further. Initial values, checkpoints and optimizers all speak of (box, flat range).
"""

import math
from collections.abc import Iterator

from llm.args import ModelArgs
from llm.plans import plan_for

Box = tuple[tuple[int, int], ...]


def whole(shape: tuple[int, ...]) -> Box:
    """The box that is everything."""
    return tuple((0, n) for n in shape)


def box_shape(box: Box) -> tuple[int, ...]:
    """Shape of a tensor that holds the box."""
    return tuple(stop - start for start, stop in box)


def share_of(total: int, rank: int, ranks: int) -> tuple[int, int]:
    """Range of rank `rank` when `total` things are cut over `ranks`: sizes differ by one at most, larger ones first."""
    small, larger = divmod(total, ranks)
    start = rank * small + min(rank, larger)
    return start, start + small + (rank < larger)


def parameter_box(
    args: ModelArgs,
    name: str,
    shape: tuple[int, ...],
    tensor: tuple[int, int] = (0, 1),
    expert: tuple[int, int] = (0, 1),
) -> Box:
    """The box of parameter `name` of whole `shape` on a rank; `tensor` and `expert` are (rank, ranks) in its groups."""
    plan = plan_for(name)
    box = list(whole(shape))
    cut = tensor_dim(args, name, tensor[1])
    if cut is not None:
        box[cut] = share_of(shape[cut], *tensor)
    if plan.ep_dim is not None:
        box[plan.ep_dim] = share_of(shape[plan.ep_dim], *expert)
    return tuple(box)


def tensor_dim(args: ModelArgs, name: str, ranks: int) -> int | None:
    """The dimension of parameter `name` that is cut over so many tensor-parallel ranks; None = all have it whole.

    Heads are cut whole. Keys and values stay whole on every rank when their heads are fewer than the ranks, and so does
    the one weight that normalises every head.
    """
    module = name.rpartition(".")[0]
    of_kv = module.endswith(("attention.wk", "attention.wv", "attention.k_norm"))
    of_each_head = args.qk_norm == "head" and module.endswith(("attention.q_norm", "attention.k_norm"))
    if ranks == 1 or of_each_head or (of_kv and args.kv_heads < ranks):
        return None
    return plan_for(name).tp_dim


def runs(shape: tuple[int, ...], box: Box, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Elements [start, stop) of the box as contiguous runs: (first element in the whole parameter, first element in the
    box, length), in order.
    """
    inner = box_shape(box)
    cut = max((i for i, (part, n) in enumerate(zip(inner, shape, strict=True)) if part != n), default=0)
    # from dimension `cut` on, the elements of a box are neighbours in the whole parameter too
    width = math.prod(inner[cut:])
    at = start
    while at < stop:
        outer, within = divmod(at, width)
        position = 0
        for i in range(cut - 1, -1, -1):
            outer, index = divmod(outer, inner[i])
            position += (box[i][0] + index) * math.prod(shape[i + 1 :])
        position += box[cut][0] * math.prod(shape[cut + 1 :]) if shape else 0
        length = min(width - within, stop - at)
        yield position + within, at, length
        at += length
