"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for matrices, AdamW for everything else, on any layout.

Muon replaces a matrix's momentum by the nearest matrix with orthonormal rows or columns, so it needs whole matrices,
while ZeRO hands the optimizer flat ranges of this rank's box of them. Here a few matrices at a time are put together:
those of a box over the data-parallel ranks, then the boxes of the tensor-parallel ranks. Each rank orthogonalises
its share of the matrices, and the results go back the same way. All of it is copies and exact sums of one value and
zeros, so the update of a matrix does not depend on how it was cut. An expert is a matrix of its own, and goes to no
rank that has other experts.

Shapes: M matrices of a stack (the experts of a layer), R rows, C columns; t tensor-parallel ranks, n elements of a
bucket on one of them.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llm.boxes import Box, box_shape
from llm.parallel.engine.deepspeed_private import OwnedRange
from llm.parallel.grid import Grid, Group
from llm.parameters import ParameterTable

BUCKET_ELEMENTS = 1 << 26
"""Momentum put together at a time, in elements, but at least one matrix: what Muon adds to the peak memory, twice."""
# Quintic iteration chosen to lift small singular values fast; it ends with all of them in about [0.7, 1.2].
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
RMS = 0.2
"""Root mean square of an AdamW update in practice: updates are scaled to it, so both optimizers share learning rates
and weight decay (Liu et al. 2025, arXiv:2502.16982)."""


@dataclass(frozen=True)
class Matrices:
    """Matrices of one parameter, which lie side by side in a bucket: this rank's boxes of them."""

    shape: tuple[int, int, int]
    """(M, R, C) of the boxes."""
    joined: int | None
    """Dimension of `shape` along which the tensor-parallel ranks' boxes make whole matrices; None = each is whole."""
    offset: int
    """Where they begin in the bucket."""
    ranges: list[OwnedRange]
    """What this rank has of them, counted from the first element of the first box."""

    @property
    def numel(self) -> int:
        return int(torch.Size(self.shape).numel())

    def of(self, bucket_tn: Tensor) -> Tensor:
        """Every tensor-parallel rank's boxes, (t, M, R, C); a view."""
        return bucket_tn.narrow(1, self.offset, self.numel).view(-1, *self.shape)

    def join(self, boxes_tMRC: Tensor) -> Tensor:
        """The whole matrices."""
        if self.joined is None:
            return boxes_tMRC[0]
        return torch.cat(boxes_tMRC.unbind(), dim=self.joined)

    def cut(self, whole_MRC: Tensor, ranks: int) -> Tensor:
        """The boxes of each rank, or once what all of them have whole."""
        if self.joined is None:
            return whole_MRC
        return torch.stack(whole_MRC.chunk(ranks, dim=self.joined))


@dataclass
class Bucket:
    """Matrices that are put together at a time, and who has parts of them."""

    tensor: Group | None
    data: Group | None
    """Ranks that have parts of the same boxes. Both are None where every rank has everything."""
    matrices: list[Matrices]
    numel: int = 0
    """Elements of the boxes on one rank."""

    @property
    def ranks(self) -> int:
        """How many share the work."""
        return (self.tensor.size if self.tensor else 1) * (self.data.size if self.data else 1)

    @property
    def rank(self) -> int:
        """This one's number among them."""
        return self.data.rank * self.tensor.size + self.tensor.rank if self.tensor and self.data else 0

    def gather(self, own_n: Tensor) -> Tensor:
        """(t, n): the boxes of all tensor-parallel ranks, given what this rank has and zeros elsewhere (collective)."""
        self._add_up(own_n)
        if self.tensor is None or self.tensor.size == 1:
            return own_n.unsqueeze(0)
        bucket = own_n.new_empty(self.tensor.size * len(own_n))
        dist.all_gather_into_tensor(bucket, own_n, group=self.tensor.handle)
        return bucket.view(self.tensor.size, -1)

    def spread(self, bucket_tn: Tensor) -> Tensor:
        """(n,): this rank's boxes, given those that it has worked on, and zeros elsewhere (collective)."""
        own_n = bucket_tn[0]
        if self.tensor is not None and self.tensor.size > 1:
            own_n = torch.empty_like(own_n)
            dist.reduce_scatter_tensor(own_n, bucket_tn.flatten(), group=self.tensor.handle)
        self._add_up(own_n)
        return own_n

    def _add_up(self, own_n: Tensor) -> None:
        if self.data is not None and self.data.size > 1:
            dist.all_reduce(own_n, group=self.data.handle)


class Muon(torch.optim.AdamW):
    """Steps groups marked `muon=True` by Muon and all others by fused AdamW; those with `lr_factor` 0 not at all.

    `describe` must be called once ZeRO has cut the parameters.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, momentum: float, **adamw: Any) -> None:
        super().__init__(groups, lr=lr, **adamw)
        self.momentum = momentum
        self._buckets: dict[int, list[Bucket]] = {}

    def describe(
        self,
        flats: list[Tensor],
        names: list[list[str]],
        table: ParameterTable,
        boxes: dict[str, Box],
        ranges: list[OwnedRange],
        grid: Grid | None,
    ) -> None:
        """Say what the flat tensors that `step` will see hold: `names` of the parameters that each is cut from, the
        model's `table`, this rank's `boxes`, and the `ranges` that it has of these. grid: None where every rank has
        everything.

        Names come in the same order on all ranks that have parts of the same matrices; so do the collectives then.
        """
        for flat, members in zip(flats, names, strict=True):
            buckets = self._buckets[id(flat)] = []
            for name in members:
                mine = [owned for owned in ranges if owned.name == name and owned.flat is flat]
                tensor = data = None
                if grid is not None:
                    tensor, data = grid.tensor, grid.reduce if table[name].expert_dim is None else grid.expert_data
                _fill(buckets, tensor, data, table[name].shape, box_shape(boxes[name]), mine)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of all groups (collective where a group is Muon's)."""
        groups = self.param_groups
        moving = [group for group in groups if group["lr_factor"]]
        self.param_groups = [group for group in moving if not group["muon"]]
        try:
            if self.param_groups:
                super().step()
        finally:
            self.param_groups = groups
        for group in moving:
            if group["muon"]:
                for flat in group["params"]:
                    if flat.grad is not None:
                        self._step_flat(flat, flat.grad, group["lr"], group["weight_decay"])

    def _step_flat(self, flat: Tensor, grad: Tensor, lr: float, weight_decay: float) -> None:
        state = self.state[flat]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(flat)
        buffer = state["momentum_buffer"]
        buffer.lerp_(grad, 1 - self.momentum)
        update = grad.lerp(buffer, self.momentum)  # Nesterov
        flat.mul_(1 - lr * weight_decay)
        for bucket in self._buckets[id(flat)]:
            self._step_bucket(bucket, flat, update, lr)

    def _step_bucket(self, bucket: Bucket, flat: Tensor, update: Tensor, lr: float) -> None:
        bucket_tn = bucket.gather(_collect(bucket, update))
        turn = bucket.rank  # the next matrix that is this rank's to work on
        for matrices in bucket.matrices:
            boxes_tMRC, mine = matrices.of(bucket_tn), slice(turn, None, bucket.ranks)
            momentum_MRC = matrices.join(boxes_tMRC[:, mine])
            cut = matrices.cut(orthogonal_update(momentum_MRC), len(boxes_tMRC)) if len(momentum_MRC) else None
            boxes_tMRC.zero_()
            if cut is not None:
                boxes_tMRC[:, mine] = cut
            turn = (turn - matrices.shape[0]) % bucket.ranks
        own_n = bucket.spread(bucket_tn)
        for matrices in bucket.matrices:
            for owned in matrices.ranges:
                part = own_n.narrow(0, matrices.offset + owned.start, owned.length)
                owned.of(flat).add_(part.to(flat.device), alpha=-lr)


def _fill(
    buckets: list[Bucket],
    tensor: Group | None,
    data: Group | None,
    shape: tuple[int, ...],
    box: tuple[int, ...],
    ranges: list[OwnedRange],
) -> None:
    """Put the matrices of a parameter of whole `shape` into the last bucket while they fit, then into new ones."""
    whole, (count, rows, columns) = (1, 1, *shape)[-3:], (1, 1, *box)[-3:]
    joined = next((i for i, n in ((1, rows), (2, columns)) if n != whole[i]), None)
    numel, capacity = rows * columns, BUCKET_ELEMENTS // (tensor.size if tensor else 1)
    first = 0
    while first < count:
        if not buckets or buckets[-1].numel + numel > capacity:
            buckets.append(Bucket(tensor, data, []))
        bucket = buckets[-1]
        taken = min(count - first, max(1, (capacity - bucket.numel) // numel))
        inside = _within(ranges, first * numel, (first + taken) * numel)
        bucket.matrices.append(Matrices((taken, rows, columns), joined, bucket.numel, inside))
        bucket.numel += taken * numel
        first += taken


def _within(ranges: list[OwnedRange], start: int, stop: int) -> list[OwnedRange]:
    """The ranges within [start, stop), counted from `start`."""
    found = []
    for owned in ranges:
        low, high = max(start, owned.start), min(stop, owned.start + owned.length)
        if low < high:
            found.append(replace(owned, start=low - start, length=high - low, offset=owned.offset + low - owned.start))
    return found


def _collect(bucket: Bucket, update: Tensor) -> Tensor:
    """(n,) float32: what this rank has of `update`, and zeros elsewhere."""
    own_n = torch.zeros(bucket.numel, dtype=torch.float32, device=_collective_device(update))
    for matrices in bucket.matrices:
        for owned in matrices.ranges:
            own_n.narrow(0, matrices.offset + owned.start, owned.length).copy_(owned.of(update))
    return own_n


def orthogonal_update(momentum: Tensor) -> Tensor:
    """The momentum (R, C) or (M, R, C) with its singular values set to about 1, scaled to a root mean square of about
    0.2 for any full-rank shape."""
    rows, columns = momentum.shape[-2:]
    return orthogonalise(momentum) * (RMS * max(rows, columns) ** 0.5)


def orthogonalise(matrix: Tensor) -> Tensor:
    """Newton-Schulz iteration towards U V^T of each matrix = U S V^T; float32 (..., R, C).

    In bf16 on a GPU, where its roundings cost less than the time; in float32 on a CPU.
    """
    work = torch.bfloat16 if matrix.is_cuda else torch.float32
    x = matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)  # then no singular value is above 1
    x = x.to(work)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = x.float()
    return x if matrix.shape[-2] <= matrix.shape[-1] else x.mT


def _collective_device(flat: Tensor) -> torch.device:
    """Where to put matrices together: offloaded partitions lie on the CPU while the process group may be NCCL."""
    if flat.device.type == "cpu" and dist.is_initialized() and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return flat.device
