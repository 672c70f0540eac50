"""What a module declares of each of its parameters: the one row that slicing, checkpoints, initial values, weight
decay, freezing and the predictions of memory and traffic read.

A row is made from ModelArgs alone, without a tensor. Rows of a module are named as its parameters are; `under` puts
them below the name of the module that holds it.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

from llm.args import ModelArgs
from llm.boxes import Box, share_of, whole
from llm.init import Constant, Draw, Normal

ParameterKind = Literal["matrix", "expert", "norm", "router", "embedding", "head", "bias", "adapter"]


VISION = "vision"
"""The unit of the vision tower and of its projection."""


@dataclass(frozen=True)
class ParamInfo:
    """One parameter of a model."""

    shape: tuple[int, ...]
    """Of the whole parameter."""
    kind: ParameterKind
    """optim.lr_factors and Muon go by it."""
    init: Draw
    tensor_dim: int | None = None
    """Dimension that tensor parallelism cuts; None = whole on every rank."""
    grain: int | None = None
    """Parts of `tensor_dim` that stay whole, such as heads; where they are fewer than the ranks, every rank has the
    parameter whole. None = single elements."""
    expert_dim: int | None = None
    """Dimension that expert parallelism cuts."""
    in_region: bool = True
    """Whether it is used inside a tensor-parallel region, so that a rank that has it whole makes one term of its
    gradient."""
    alike: bool = False
    """Whether every tensor-parallel rank computes the same with it, of tokens that are never cut: so is its gradient.
    """
    decay: bool = False
    """Whether weight decay applies."""
    active: float = 1.0
    """Share of it that a token meets in a product or norm: of experts, those that it visits; of a table, nothing."""
    unit: str = ""
    """The part of the model that it belongs to, which no pipeline cuts: vision, tok_embeddings, encoder.layers.N,
    encoder.norm, layers.N, norm or output."""
    trainable: bool = True
    beside_adapters: bool = False
    """Whether it trains whole where the model has adapters, which freeze all else."""
    may_be_int8: bool = False
    """Whether its module can compute with an Int8Weight in its place, which sums over dimension 1."""
    int8: bool = False
    """Whether it is such a one, and no parameter."""

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def active_numel(self) -> int:
        """Elements that a token meets in a matrix product or norm."""
        return round(self.numel * self.active)

    def cut(self, ranks: int) -> int | None:
        """The dimension that so many tensor-parallel ranks cut; None = all have it whole."""
        if ranks == 1 or self.tensor_dim is None or (self.grain is not None and self.grain < ranks):
            return None
        return self.tensor_dim

    def box(self, tensor: tuple[int, int] = (0, 1), expert: tuple[int, int] = (0, 1)) -> Box:
        """The box of it on a rank; `tensor` and `expert` are (rank, ranks) in its groups."""
        box = list(whole(self.shape))
        cut = self.cut(tensor[1])
        if cut is not None:
            grains = self.grain or self.shape[cut]
            width = self.shape[cut] // grains
            start, stop = share_of(grains, *tensor)
            box[cut] = start * width, stop * width
        if self.expert_dim is not None:
            box[self.expert_dim] = share_of(self.shape[self.expert_dim], *expert)
        return tuple(box)


Rows = dict[str, ParamInfo]
"""By name, in the order of the module's own parameters."""


def under(name: str, rows: Rows) -> Rows:
    """The rows of a module that another holds as `name`."""
    return {f"{name}.{own}": row for own, row in rows.items()}


def of_unit(unit: str, rows: Rows) -> Rows:
    """Rows that are a unit of the model's."""
    return {name: replace(row, unit=unit) for name, row in rows.items()}


def in_unit(name: str, rows: Rows) -> Rows:
    """The rows of a unit of the model that is one module."""
    return of_unit(name, under(name, rows))


ZEROS = Constant(0.0)


def weights(args: ModelArgs, writes_residual: bool = False) -> Normal:
    """Initial values of a matrix; init_depth_scale lowers those of what writes into the residual stream."""
    scaled = args.init_depth_scale and writes_residual
    return Normal(args.init_std / math.sqrt(2 * args.n_layers) if scaled else args.init_std)
