"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for matrices, AdamW for everything else, under ZeRO.

Muon replaces a matrix's momentum by the nearest matrix with orthonormal rows or columns, so it needs whole matrices,
while ZeRO hands the optimizer flat pieces of them. Here the pieces of a few matrices at a time are put together on all
ranks, each rank orthogonalises its share of the matrices, and the results are spread again: exact sums of values and
zeros, so the update of a matrix does not depend on how it was cut.

Shapes: R rows, C columns, M matrices of a stack (the experts of a layer).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llm.parallel.deepspeed_private import Piece

BUCKET_ELEMENTS = 1 << 26
"""Momentum put together at a time, in elements: what Muon adds to the peak memory, twice."""
# Quintic iteration chosen to lift small singular values fast; it ends with all of them in about [0.7, 1.2].
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
RMS = 0.2
"""Root mean square of an AdamW update in practice: updates are scaled to it, so both optimizers share learning rates
and weight decay (Liu et al. 2025, arXiv:2502.16982)."""


@dataclass(frozen=True)
class Matrix:
    """A parameter that Muon updates: where it lies in its bucket, and this rank's pieces of it."""

    shape: tuple[int, ...]
    offset: int
    pieces: list[Piece]

    @property
    def numel(self) -> int:
        return int(torch.Size(self.shape).numel())


class Muon(torch.optim.AdamW):
    """Steps groups marked `muon=True` by Muon and all others by fused AdamW.

    `describe` must be called once ZeRO has cut the parameters.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, momentum: float, **adamw: Any) -> None:
        super().__init__(groups, lr=lr, **adamw)
        self.momentum = momentum
        self._buckets: dict[int, list[list[Matrix]]] = {}
        self._ranks = 1

    def describe(
        self,
        flats: list[Tensor],
        names: list[list[str]],
        shapes: dict[str, tuple[int, ...]],
        pieces: list[Piece],
        ranks: int,
    ) -> None:
        """Tell what the flat tensors that `step` will see hold: `names` of the whole parameters that each is cut from,
        and this rank's `pieces`. ranks: over how many the parameters are cut; 1 where every rank has them whole.
        """
        self._ranks = ranks
        for flat, members in zip(flats, names, strict=True):
            buckets: list[list[Matrix]] = []
            filled = BUCKET_ELEMENTS
            for name in members:
                numel = torch.Size(shapes[name]).numel()
                if filled + numel > BUCKET_ELEMENTS:
                    buckets.append([])
                    filled = 0
                mine = [piece for piece in pieces if piece.name == name and piece.flat is flat]
                buckets[-1].append(Matrix(shapes[name], filled, mine))
                filled += numel
            self._buckets[id(flat)] = buckets

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of all groups (collective where a group is Muon's)."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            if self.param_groups:
                super().step()
        finally:
            self.param_groups = groups
        for group in groups:
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

    def _step_bucket(self, bucket: list[Matrix], flat: Tensor, update: Tensor, lr: float) -> None:
        numel = bucket[-1].offset + bucket[-1].numel
        device = _collective_device(flat)
        whole = torch.zeros(numel, dtype=torch.float32, device=device)
        for matrix in bucket:
            for piece in matrix.pieces:
                whole.narrow(0, matrix.offset + piece.start, piece.length).copy_(piece.of(update))
        rank = 0
        if self._ranks > 1:
            rank = dist.get_rank()
            dist.all_reduce(whole)
        for i, matrix in enumerate(bucket):
            part = whole.narrow(0, matrix.offset, matrix.numel)
            if i % self._ranks == rank:
                part.copy_(orthogonal_update(part.view(matrix.shape)).reshape(-1))
            else:
                part.zero_()
        if self._ranks > 1:
            dist.all_reduce(whole)
        for matrix in bucket:
            for piece in matrix.pieces:
                part = whole.narrow(0, matrix.offset + piece.start, piece.length)
                piece.of(flat).add_(part.to(flat.device), alpha=-lr)


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
