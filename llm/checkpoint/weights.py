"""Parameters by canonical name, in boxes, read from a model in memory, a checkpoint or a model folder."""

from math import prod
from typing import Protocol

import torch
from torch import Tensor, nn

from llm.boxes import Box, runs, whole
from llm.checkpoint.fragments import BLOCK_BYTES, DTYPES
from llm.checkpoint.reader import Checkpoint
from llm.errors import UserError


class Weights(Protocol):
    """Parameters of ours by canonical name, in boxes."""

    def read(self, name: str, box: Box, out: Tensor) -> Tensor:
        """Copy a box of a parameter into `out`, of the box's shape; returns it."""


class ModuleWeights:
    """Weights of a model in memory."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = dict(model.named_parameters())

    def read(self, name: str, box: Box, out: Tensor) -> Tensor:
        return out.copy_(boxed(self._parameters[name].detach(), box))


class CheckpointWeights:
    """Weights of a checkpoint or model folder, or their moving average. Reading in order reads each block once."""

    def __init__(self, checkpoint: Checkpoint, average: bool = False) -> None:
        self.checkpoint = checkpoint
        self._kind = "ema" if average else "master"
        if average and not all("ema" in kinds for kinds in checkpoint.kinds().values()):
            raise UserError(f"{checkpoint.path}: holds no averaged weights; the run had no optim.ema_decay")

        self._block: tuple[str, int, Tensor] = ("", 0, torch.empty(0))
        """(parameter, first element, values), the last that was read."""

    def read(self, name: str, box: Box, out: Tensor) -> Tensor:
        shape = self.checkpoint.shapes.get(name, ())
        at, _, length = next(runs(shape, box, 0, out.numel()), (0, 0, 0)) if len(shape) == len(box) else (0, 0, 0)
        if not out.is_contiguous():
            return out.copy_(self.read(name, box, torch.empty(out.shape, dtype=self.dtype())))
        rest = out.view(-1)
        if length < len(rest):
            self._fill(name, box, 0, rest)
            return out
        size, step = prod(shape), BLOCK_BYTES // self.dtype().itemsize
        while len(rest):
            n = len(rest) if at + len(rest) == size else len(rest) // step * step
            if at % step == 0 and n:  # whole blocks go straight to where they belong
                self._fill(name, whole(shape), at, rest[:n])
            else:
                values = self._from(name, at, size)[: len(rest)]
                n = len(values)
                rest[:n].copy_(values)
            rest, at = rest[n:], at + n
        return out

    def _from(self, name: str, at: int, size: int) -> Tensor:
        """The values of a parameter from element `at` on, as many as a block holds."""
        of, first, values = self._block
        if of != name or not first <= at < first + len(values):
            step = BLOCK_BYTES // self.dtype().itemsize
            first = at // step * step
            self._block = "", 0, torch.empty(0)  # so that there are not two
            values = torch.empty(min(step, size - first), dtype=self.dtype())
            self._fill(name, whole(self.checkpoint.shapes[name]), first, values)
            self._block = name, first, values
        return values[at - first :]

    def _fill(self, name: str, box: Box, start: int, out: Tensor) -> None:
        """Values of the flattened box from `start` on."""
        self.checkpoint.fill([(name, self._kind, box, start, start + len(out), out)])

    def dtype(self) -> torch.dtype:
        """In which the weights are kept."""
        return DTYPES[self.checkpoint.dtype(self._kind)]


def boxed(tensor: Tensor, box: Box) -> Tensor:
    """The box of a tensor."""
    for dim, (start, stop) in enumerate(box):
        if (start, stop) != (0, tensor.shape[dim]):
            tensor = tensor.narrow(dim, start, stop - start)
    return tensor


def check_range(key: str, exact: Tensor, written: Tensor) -> None:
    """UserError where a finite value has become infinite."""
    lost = written.isinf() & exact.isfinite()
    if lost.any():
        largest = float(exact[lost].abs().max())
        raise UserError(
            f"{key}: {int(lost.sum())} values, up to {largest:.4g}, are beyond float16 "
            f"({torch.finfo(torch.float16).max:g}); --dtype=bfloat16 or --dtype=float32 hold them"
        )
