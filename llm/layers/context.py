"""What all layers of one forward share: everything that differs between two calls of the same model.

Shapes: B batch, T tokens, m rotated pairs, M number of MoE layers, E experts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from llm.args import ModelArgs
from llm.datatypes import RouteCounts
from llm.kernels.rotate import Turns
from llm.layers.across import AttendAcross
from llm.layers.dropout import AttentionDropout
from llm.layers.masks import Attend
from llm.layers.rope import amplitude, dynamic_frequencies, inverse_frequencies, rotation
from llm.layers.strides import Strides


class LayerState(Protocol):
    """What one layer remembers of the rows of a batch, beside keys and values."""

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""

    def reorder(self, rows: Tensor) -> None:
        """Keep row rows[i] (int64, on the CPU) as row i."""


State = TypeVar("State", bound=LayerState)


class States(Protocol):
    """The states of all layers that have one."""

    def state(self, layer: int, make: Callable[[], State]) -> State:
        """That of a layer, made when first asked for; the layer changes it in place."""


@dataclass(frozen=True)
class Budget:
    """How many tokens of a document may attend in a routed layer."""

    bounds_BT: Tensor
    """int64: until each token, itself included."""
    most: int
    """Tokens of a row of this forward, at most."""


@dataclass(frozen=True)
class Context:
    """What all layers of one forward share; made once from its inputs."""

    shape: tuple[int, int]
    """Rows B and tokens T of the batch."""
    starts_BT: Tensor | None = None
    """bool: true for the first token of a document or of padding, a row's first among them; only for mixers with a
    state. With `states` each row is one document, and its tokens go on from there."""
    documents_BT: Tensor | None = None
    """int64 that rises where a document of the row begins, padding counting to the document before it; None where each
    row is one document, or no mixer has a state."""
    strides: Strides | None = None
    """Of layers with a stride; None without such layers."""
    budget: Budget | None = None
    """Of tokens that may attend, in routed layers; None without such layers."""
    thresholds: Mapping[int, float] = field(default_factory=dict)
    """Of the scores of routed layers, by their numbers; 0 where there is none."""
    reports: "dict[int, RouteCounts] | None" = None
    """What routed layers report, by their numbers; None where nothing is to be reported. A forward that is repeated
    reports the same again."""
    attend: Attend | None = None
    """Attention over the batch itself, or over a cache; None where no layer attends."""
    states: "States | None" = None
    """What mixers with a state remember of earlier tokens of the rows; None without a cache."""
    rotation_BT1m: Tensor | Turns | None = None
    """complex64, for RoPE layers."""
    positions_BT: Tensor | None = None
    """int64, negative for padding, B = 1 where all rows have the same; for what is added to token vectors."""
    temperature_BT11: Tensor | None = None
    """float32, for layers with temperature tuning."""
    attention_dropout: AttentionDropout | None = None
    """What layers with a stride drop of attention weights, of which `attend` knows nothing."""
    valid_BT: Tensor | None = None
    """bool: false for padding; None where there is none."""
    expert_counts: Tensor | None = None
    """(M, E) int64, for the balance loss: assignments of the whole previous step; None or all 0 = not known yet."""
    keys_N: Tensor | None = None
    """(B * T,) int64: of each token, by which its part in random choices such as dropout is made; None = there are
    none, as outside of training."""
    residual_keys_n: Tensor | None = None
    """Those of the tokens whose residual stream is on this rank."""
    cut_sequence: bool = False
    """Whether each tensor-parallel rank has the residual stream of its own tokens only."""
    source: "Context | None" = None
    """That of the encoder's layers, of the same forward; None without an encoder, or where it has nothing to read."""
    across: AttendAcross | None = None
    """Attention to what the encoder made; None without."""


def angles(args: ModelArgs, positions_BT: Tensor, lengths_BT: Tensor | None = None) -> Tensor:
    """By what heads are rotated at each position, complex64 (B, T, 1, m). lengths_BT: positions of each token's
    document, for frequencies that depend on them."""
    width, theta, scaling = args.rotated_width, args.rope_theta, args.rope_scaling
    frequency = inverse_frequencies(width, theta, scaling)
    if scaling is not None and lengths_BT is not None:
        frequency = dynamic_frequencies(lengths_BT, width, theta, scaling)
    return rotation(positions_BT, frequency, amplitude(scaling))


def temperature(args: ModelArgs, positions_BT: Tensor) -> Tensor:
    """Factor on the queries of each position, float32 (B, T, 1, 1); 1 below floor_scale - 1."""
    steps_BT = (positions_BT.clamp(min=0) + 1) // args.floor_scale
    return (1 + args.attn_scale * torch.log1p(steps_BT.float()))[..., None, None]
