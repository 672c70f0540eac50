"""A model on the ranks that evaluate it, whatever its path means, and the digest by which it is known.

Each rank reads its own boxes. The digest is of what the model computes with: of its weights' values and of what of its
args decides the function. It is the same on every layout, and for a checkpoint, an import and an export of one model.
"""

import hashlib
from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from llm.adapters.peft_folder import is_peft
from llm.args import ModelArgs
from llm.boxes import Box
from llm.checkpoint.run_folder import load_checkpoint
from llm.checkpoint.weights import Weights
from llm.errors import UserError
from llm.foreign.export import laid_out_by_rope, meaning
from llm.foreign.files import is_foreign
from llm.model import LLM
from llm.parallel.collectives import all_or_none, gather_json
from llm.parallel.grid import Grid
from llm.parallel.replica import Replica
from llm.pretrained import checkpoint_weights, read_foreign, taken_from, weights_of

BLOCK = 1 << 18
"""Values whose bits are mixed at once."""
MULTIPLIERS = (0x9E3779B97F4A7C15 - (1 << 64), 0x5851F42D4C957F2D)
"""Odd, so that a product modulo 2^64 loses nothing."""


Heads = tuple[int, int]
"""(width of a head, how much of it RoPE turns)."""


class InDtype:
    """All of each parameter, in one dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def allocate(self, model: LLM, device: torch.device) -> None:
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.empty_like(parameter, dtype=self._dtype, device=device)))

    def share(self, parameter: nn.Parameter) -> tuple[int, Tensor]:
        return 0, parameter.data.view(-1)


def open_replica(path: Path, grid: Grid, dtype: torch.dtype, average: bool = False) -> Replica:
    """The model that a path means on these ranks (collective), without gradients. average: the moving average of the
    weights of a run. UserError on all ranks where it cannot be read.
    """

    def read() -> Replica:
        args, weights = opened(path, average)
        replica = Replica.build(args, None, grid, storage=InDtype(dtype))
        replica.model.to(dtype)  # buffers too
        _fill(replica, weights)
        return replica

    replica = all_or_none(read, grid.world)
    replica.model.requires_grad_(False)
    replica.model.eval()
    return replica


def opened(path: Path, average: bool) -> tuple[ModelArgs, Weights]:
    """What the model is, and its parameters in boxes. UserError where averaged weights are wanted and there are none.
    """
    if average and (is_foreign(path) or is_peft(path)):
        raise UserError(f"{path}: holds no averaged weights")
    if average:
        checkpoint, args = load_checkpoint(path)
        return args, checkpoint_weights(checkpoint, average)
    if is_foreign(path) and not is_peft(path):
        source = read_foreign(path, None)
        weights = source.weights()
        weights.check_twins()
        return source.args, weights
    return weights_of(path, None)


@torch.no_grad()
def _fill(replica: Replica, weights: Weights) -> None:
    for name, parameter in replica.model.named_parameters():
        box = replica.grid.box(replica.table[name])
        if parameter.device.type == "cpu":
            weights.read(name, box, parameter.data)
        else:
            parameter.copy_(weights.read(name, box, torch.empty_like(parameter, device="cpu")))


def files_digest(path: Path, average: bool) -> str:
    """Of what a model is read from, without reading it where a manifest says what it holds. The same files are the same
    model; other files may be, too."""
    return taken_from(path).digest + ("/average" if average else "")


def model_digest(replica: Replica) -> str:
    """32 hexadecimal digits that change with any bit of any weight, and with what the model makes of them (collective).
    UserError where ranks that hold the same part of a parameter hold other values: one has read it wrong.
    """
    args, mine = replica.model.args, []
    for name, parameter in replica.model.named_parameters():
        row = replica.table[name]
        box = replica.grid.box(row)
        head = args.head_width if args.rope_interleaved and laid_out_by_rope(args, name) else 0
        mine.append([name, box, _mixed(parameter, box, row.shape, (head, args.rotated_width) if head else None)])
    parts: dict[tuple[str, Box], int] = {}
    for rank, rows in enumerate(gather_json(mine, replica.world)):
        for name, ranges, number in rows:
            box = tuple((start, stop) for start, stop in ranges)
            if parts.setdefault((name, box), number) != number:
                raise UserError(f"rank {rank} has read other values of {name} than a rank before it; start again")
    sums: dict[str, int] = {}
    for (name, _), number in parts.items():
        sums[name] = (sums.get(name, 0) + number) % (1 << 64)
    content = [f"{key}={value!r}" for key, value in sorted(meaning(args).items())]
    content += [f"{name} {replica.table[name].shape} {sums[name]}" for name in sorted(sums)]
    return hashlib.blake2b("\n".join(content).encode(), digest_size=16).hexdigest()


def _mixed(values: Tensor, box: Box, shape: tuple[int, ...], heads: Heads | None = None) -> int:
    """Sum, modulo 2^64, of the bits of each value mixed with its place in the whole parameter: sums of boxes that
    together are the whole are its sum, however it was cut. heads: of rows whose pairs for RoPE are neighbours; they
    count at the places that they have where a head's first halves stand before the second ones."""
    first, second = MULTIPLIERS
    total = 0
    at = 0
    flat = values.detach().reshape(-1)
    for places in _places(box, shape, heads, values.device):
        bits = flat[at : at + len(places)].float().view(torch.int32).long()
        at += len(places)
        mixed = places.mul_(first).add_(bits)
        mixed = mixed.bitwise_xor_(mixed >> 29).mul_(second)
        total += int(mixed.bitwise_xor_(mixed >> 32).sum())
    return total % (1 << 64)


def _places(box: Box, shape: tuple[int, ...], heads: Heads | None, device: torch.device) -> Iterator[Tensor]:
    """Places in the flattened whole of the elements of a box, in order, some at a time."""
    along = [torch.arange(start, stop, device=device) * prod(shape[i + 1 :]) for i, (start, stop) in enumerate(box)]
    if heads is not None:
        along[0] = _halves(torch.arange(*box[0], device=device), heads) * prod(shape[1:])
    rows, columns = torch.zeros(1, dtype=torch.int64, device=device), along[-1] if along else torch.zeros(1).long()
    for inner in along[:-1]:
        rows = (rows[:, None] + inner).flatten()
    for some in rows.split(max(1, BLOCK // max(1, len(columns)))):
        yield (some[:, None] + columns).flatten()


def _halves(rows: Tensor, heads: Heads) -> Tensor:
    """Where rows of pairs go when each head has its first halves first."""
    width, rotated = heads
    head, inside = rows // width, rows % width
    return head * width + torch.where(inside < rotated, inside % 2 * (rotated // 2) + inside // 2, inside)
