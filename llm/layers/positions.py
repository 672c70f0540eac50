"""What `model.pos` names: how a model knows where its tokens stand.

Queries and keys are rotated (llm/layers/rope.py), or vectors of the positions are added to those of the tokens: waves
(Vaswani et al. 2017, arXiv:1706.03762), or rows of a table that is learned (Devlin et al. 2019, arXiv:1810.04805).

Shapes: B rows, T tokens, D model width, n positions.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.args import ModelArgs
from llm.args.layers import POSITIONS
from llm.init import Draw
from llm.kernels.segments import Ints
from llm.layers.parameter import ParamInfo, Rows, weights

POSITION_TABLE = "pos_embeddings"
"""What the module with parameters is called, beside the token table."""
BASE = 10_000.0


class PositionKind(NamedTuple):
    """A way to know positions."""

    rotates: bool = False
    """Whether attention rotates queries and keys, on the layers that have RoPE."""
    build: Callable[[ModelArgs], Callable[[Tensor], Tensor]] | None = None
    """Makes what gives vectors (..., D) of positions (...) int64, none negative: a function, or a module with
    parameters. They are added to token vectors, after embed_scale and embed_norm. None = nothing is added."""
    declare: Callable[[ModelArgs], Rows] | None = None
    """What the module's parameters are (llm/layers/parameter.py), used outside of tensor-parallel regions."""
    most: Callable[[ModelArgs], int] | None = None
    """How many positions there are; None = any number."""


def register(name: str, kind: PositionKind) -> None:
    """Let configs name a way to know positions. Raises ValueError where the name is taken."""
    POSITIONS.register(name, kind)


def position_rows(args: ModelArgs) -> Rows:
    """What the parameters of the model's kind are."""
    declare = POSITIONS[args.pos].declare
    return {} if declare is None else declare(args)


def check_positions(args: ModelArgs, positions_BT: Ints) -> None:
    """Raises ValueError where a position of a batch is past the last of the model."""
    most = POSITIONS[args.pos].most
    if most is not None and positions_BT.max() >= most(args):
        row = int(positions_BT.max(axis=1).argmax())
        raise ValueError(
            f"position {positions_BT[row].max()} of row {row}: model.pos={args.pos} has positions 0 to "
            f"{most(args) - 1} (model.max_seq_len={args.max_seq_len})"
        )


def sinusoids(positions: Tensor, dim: int) -> Tensor:
    """Of each position p, float32 (..., D): sin(p / 10000^(2i/D)) at 2i, the cosine at 2i + 1. Made on demand, as a
    table would have to guess the longest text."""
    places = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device)
    angles = positions[..., None].float() * BASE ** (-places / dim)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)[..., :dim]


class LearnedPositions(nn.Module):
    """A row of a (max_seq_len, D) table for each position; whole on every tensor-parallel rank."""

    def __init__(self, n_positions: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_positions, dim))

    @staticmethod
    def declare(n_positions: int, dim: int, init: Draw) -> Rows:
        """What the parameter is: see llm/layers/parameter.py."""
        return {"weight": ParamInfo((n_positions, dim), "embedding", init, in_region=False, active=0.0)}

    def forward(self, positions: Tensor) -> Tensor:
        return F.embedding(positions, self.weight)


register("rope", PositionKind(rotates=True))
register("sinusoidal", PositionKind(build=lambda args: partial(sinusoids, dim=args.dim)))
register(
    "learned",
    PositionKind(
        build=lambda args: LearnedPositions(args.max_seq_len, args.dim),
        declare=lambda args: LearnedPositions.declare(args.max_seq_len, args.dim, weights(args)),
        most=lambda args: args.max_seq_len,
    ),
)
register("none", PositionKind())
