"""What goes into and comes out of `LLM.forward`.

Shapes: B batch, T tokens, D model width, V vocabulary, S documents, n outputs of a prediction head, E experts, M number
of MoE layers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]


@dataclass
class TransformerInput:
    """A batch of token rows."""

    tokens: Tensor
    """(B, T) int64 token ids."""
    tokens_position: int | Tensor | None = None
    """Position of each token in its document: None counts from 0 (with a cache, from its end), an int is the first
    position of every row, else (T,) or (B, T). Positions rise strictly inside a document; negative ones mark padding,
    which no token sees."""
    cu_seqlens: Tensor | None = None
    """(S + 1,) integers on the CPU: document boundaries in the flattened B*T tokens, from 0 to B*T, every row start
    among them. None = one document a row."""
    images: Tensor | Sequence[Tensor] | None = None
    """(n, 3, S, S), the tiles of all images in the order of their slots in the flattened tokens: uint8 levels, or
    floats as the tower reads them; where model.vision.kind is native, the images, (3, H, W) each, whose sides patches
    and the vectors that they make divide. None = no images."""
    parents: Tensor | None = None
    """(S,) integers on the CPU: of each document of cu_seqlens, the one before it that it goes on from, whose tokens it
    sees, and what those see; -1 = none. Its positions go on too. Without tokens_position, and for attention alone."""
    causal: bool | Tensor | None = None
    """Whether tokens see none behind them in their document; false = they see it both ways. A (B,) bool tensor on the
    CPU says it of each row. None = as model.causal says."""
    features: Tensor | None = None
    """(B, T, F) floats, what a model of values (model.input_dim) reads in place of tokens, which are 0 then."""

    source: "TransformerInput | None" = None
    """Of an encoder-decoder: what the encoder reads of the same rows, tokens (B, S) with documents and padding of their
    own. Document i of a row attends to document i of the row's source, and to no other; documents that are padding
    alone do not count. None = there is no encoder, or `memory` or a cache holds what it made."""

    @classmethod
    def of(cls, rows: Tensor) -> "TransformerInput":
        """Rows of tokens, or of values where they are floats."""
        return cls.of_features(rows) if rows.is_floating_point() else cls(rows)

    @classmethod
    def of_features(cls, features: Tensor, **others: Any) -> "TransformerInput":
        """Rows of values (B, T, F); others: the fields besides tokens. ValueError where they have another shape."""
        if features.ndim != 3:
            raise ValueError(f"values must be floats of shape (B, T, F) (one row is values[None]); got "
                             f"{_describe(features)}")  # fmt: skip
        tokens = torch.zeros(features.shape[:2], dtype=torch.int64, device=features.device)
        return cls(tokens, features=features, **others)

    def causal_rows(self, default: bool) -> bool | NDArray[np.bool_]:
        """Whether all rows are causal, or which are, (B,), where they differ. default: of a batch that does not say.
        Raises ValueError where `causal` is something else."""
        if self.causal is None:
            return default
        if isinstance(self.causal, bool):
            return self.causal
        found, n_rows = self.causal, len(self.tokens)
        if not isinstance(found, Tensor) or found.dtype != torch.bool or found.shape != (n_rows,) or found.is_cuda:
            got = _describe(found) if isinstance(found, Tensor) else repr(found)
            raise ValueError(f"causal must be None, a bool or a ({n_rows},) bool tensor on the CPU; got {got}")
        causal_B = found.numpy()
        return bool(causal_B[0]) if (causal_B == causal_B[0]).all() else causal_B

    def images_on(self, device: torch.device) -> Tensor | Sequence[Tensor] | None:
        """The images on a device."""
        if self.images is None or isinstance(self.images, Tensor):
            return None if self.images is None else self.images.to(device)
        return [image.to(device) for image in self.images]

    def check_tokens(self, vocab_size: int | None = None) -> None:
        """Raise ValueError unless tokens is a (B, T) int64 tensor with at least one token, with ids below `vocab_size`:
        on a CPU, as looking at them would stall a GPU.
        """
        if self.tokens.ndim != 2 or self.tokens.dtype != torch.int64 or self.tokens.numel() == 0:
            raise ValueError(
                f"tokens must be non-empty (B, T) int64 (one row is tokens[None]); got {_describe(self.tokens)}"
            )
        if vocab_size is not None and self.tokens.device.type == "cpu":
            low, high = (int(bound) for bound in self.tokens.aminmax())
            if low < 0 or high >= vocab_size:
                raise ValueError(f"token ids go from {low} to {high}; model.vocab_size={vocab_size} allows 0 and up")

    def resolve(self, first_position_B: Ints | None = None) -> tuple[Ints, Ints]:
        """Positions (B, T) and the flat indices where documents start, on the host. Malformed input: ValueError.

        first_position_B: where each row continues when tokens_position is None; unset = 0.
        """
        self.check_tokens()
        n_rows, row_length = self.tokens.shape
        starts = self._document_starts()
        if self.parents is not None and (self.cu_seqlens is None or self.tokens_position is not None):
            raise ValueError("parents are of documents that cu_seqlens bounds, whose positions follow from them")
        if isinstance(self.tokens_position, Tensor):
            positions = self._given_positions(self.tokens_position)
        elif self.tokens_position is None and self.cu_seqlens is not None:
            lengths = np.diff(np.append(starts, self.tokens.numel()))
            firsts = starts - self._first_positions(lengths)
            positions = (np.arange(self.tokens.numel()) - np.repeat(firsts, lengths)).reshape(n_rows, row_length)
        else:
            positions = self._counted_from(self.tokens_position, first_position_B)
        self._check_rising(positions, starts)
        return positions, starts

    def _first_positions(self, lengths_S: Ints) -> Ints:
        """Of each document: where its parent's end."""
        found = np.zeros(len(lengths_S), dtype=np.int64)
        if self.parents is not None:
            parents_S = self.parents.numpy()
            if len(parents_S) != len(found) or (parents_S >= np.arange(len(found))).any():
                raise ValueError(
                    f"parents must name, for each of the {len(found)} documents, one that comes before it, or be -1"
                )
            for document in np.flatnonzero(parents_S >= 0).tolist():
                found[document] = found[parents_S[document]] + lengths_S[parents_S[document]]
        return found

    def _document_starts(self) -> Ints:
        n_tokens, row_length = self.tokens.numel(), self.tokens.shape[1]
        if self.cu_seqlens is None:
            return np.arange(0, n_tokens, row_length)
        if self.cu_seqlens.ndim != 1 or self.cu_seqlens.is_floating_point() or self.cu_seqlens.device.type != "cpu":
            raise ValueError(f"cu_seqlens must be a 1-D integer tensor on the CPU; got {_describe(self.cu_seqlens)}")
        bounds = self.cu_seqlens.numpy().astype(np.int64)
        if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != n_tokens or (np.diff(bounds) <= 0).any():
            raise ValueError(f"cu_seqlens must rise strictly from 0 to B*T={n_tokens}; got {_shortened(bounds)}")
        if not np.isin(np.arange(0, n_tokens, row_length), bounds).all():
            raise ValueError(
                f"cu_seqlens must contain every row start (multiples of T={row_length}): no document spans rows"
            )
        return bounds[:-1]

    def _given_positions(self, position: Tensor) -> Ints:
        n_rows, row_length = self.tokens.shape
        if position.is_floating_point() or tuple(position.shape) not in ((row_length,), (n_rows, row_length)):
            raise ValueError(
                f"tokens_position must be None, an int, or integers of shape ({row_length},) or "
                f"({n_rows}, {row_length}); got {_describe(position)}"
            )
        return np.broadcast_to(position.cpu().numpy().astype(np.int64), (n_rows, row_length))

    def _counted_from(self, first: int | None, first_position_B: Ints | None) -> Ints:
        n_rows, row_length = self.tokens.shape
        if first is not None:
            if isinstance(first, bool) or not isinstance(first, int) or first < 0:
                raise ValueError(f"tokens_position={first!r} must be None, an int >= 0 or an integer tensor")
            if self.cu_seqlens is not None:
                raise ValueError(
                    f"tokens_position={first} with cu_seqlens: give a tensor, or None to count inside documents"
                )
            first_position_B = np.full(n_rows, first)
        if first_position_B is None:
            first_position_B = np.zeros(n_rows, dtype=np.int64)
        return first_position_B[:, None] + np.arange(row_length)

    @staticmethod
    def _check_rising(positions_BT: Ints, starts: Ints) -> None:
        positions = positions_BT.reshape(-1)
        inside = np.ones(positions.size, dtype=bool)
        inside[starts] = False
        falls = inside[1:] & (positions[1:] >= 0) & (positions[:-1] >= positions[1:])
        if falls.any():
            row, column = divmod(int(np.flatnonzero(falls)[0]) + 1, positions_BT.shape[1])
            raise ValueError(
                f"tokens_position must rise strictly inside a document (negative = padding); row {row} has "
                f"{positions_BT[row, column - 1]} then {positions_BT[row, column]} at token {column}"
            )


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"


def _shortened(values: Ints) -> str:
    return str(values.tolist()) if len(values) <= 8 else f"{values[:4].tolist()} ... {values[-4:].tolist()}"


class LossSum(NamedTuple):
    """The sum of a loss over the targets of a batch."""

    total: Tensor
    """float32 scalar, differentiable."""
    per_token: Tensor | None = None
    """(B, T) float32 without gradient: each target's part, 0 where there is none; None where that is not known."""
    measures: Mapping[str, Tensor] | None = None
    """What the objective says besides, by its `measures`: float32 scalars without gradient, sums as `total` is."""
    predictions: "Predictions | None" = None
    """Where gradients are off, of an objective that predicts documents."""


class Predictions(NamedTuple):
    """What a prediction head makes of the labelled documents of a batch, in their order; S: these alone."""

    outputs_Sn: Tensor
    """float32, without gradient."""
    labels_SL: Tensor
    """float32, NaN where one is missing."""
    places_S: Tensor
    """int64: the first token of each, among the flattened tokens of the batch."""


class RouterStats(NamedTuple):
    """What MoE layers report of their routing: sums over tokens that are no padding, so that the cuts of a batch add
    up to the whole."""

    balance_sum: Tensor
    """float32 scalar: aux_alpha * E * sum over tokens t and experts e of f_e P_te; without E where
    moe.aux_times_experts is off."""
    z_sum: Tensor
    """float32 scalar: z_alpha * sum over tokens of logsumexp(logits)^2."""
    expert_counts: Tensor
    """(E,) int64: assignments to each expert, those that it has no place for among them; of several layers together
    (M, E)."""
    rejected: Tensor | None = None
    """int64 scalar: assignments that found their expert full; None where experts have no capacity."""

    @classmethod
    def together(cls, layers: Sequence["RouterStats"]) -> "RouterStats":
        """Those of several layers."""
        balance, z, counts = (torch.stack(parts) for parts in zip(*(stats[:3] for stats in layers), strict=True))
        rejected = [stats.rejected for stats in layers if stats.rejected is not None]
        return cls(balance.sum(), z.sum(), counts, torch.stack(rejected).sum() if rejected else None)


BINS = 1 << 14
"""In which the scores of routed layers are counted."""
ROUTE_NUMBERS = BINS + 3
"""That a routed layer reports."""


class RouteCounts(NamedTuple):
    """What a routed layer reports of a forward: sums over its tokens."""

    numbers: Tensor
    """float64, (ROUTE_NUMBERS,): scores in each bin, tokens that wanted to attend, those that did, and the sum of the
    gates of these. All but the last are counts."""

    @property
    def scores(self) -> Tensor:
        """Counts of the bins."""
        return self.numbers[:BINS]

    def rate(self) -> float:
        """Share of tokens that attended."""
        return self._of_tokens(BINS + 1)

    def overflow(self) -> float:
        """Share of tokens that wanted to attend and did not, as the budget of their document was spent."""
        return self._of_tokens(BINS) - self.rate()

    def gate(self) -> float:
        """Mean gate of those that attended."""
        attended = self.numbers[BINS + 1].item()
        return self.numbers[BINS + 2].item() / attended if attended else math.nan

    def _of_tokens(self, place: int) -> float:
        n_tokens = self.scores.sum().item()
        return self.numbers[place].item() / n_tokens if n_tokens else math.nan


@dataclass
class TransformerOutput:
    """What was asked for; the rest is None."""

    logits: Tensor | None = None
    """(B, T, V) float32; None when labels or return_hidden were given."""
    outputs: Tensor | None = None
    """(B, T, O) float32, in place of logits where the model predicts values (model.output_dim): in the units of the
    data, as model.output_mean and output_std scale them."""
    hidden: Tensor | None = None
    """(B, T, D) final normed hidden states, with return_hidden."""
    loss_sum: Tensor | None = None
    """float32 scalar: sum of the negative log-likelihood, in nats, over labels >= 0; or the first of `losses`."""
    n_targets: Tensor | None = None
    """int64 scalar: number of labels >= 0."""
    losses: Mapping[str, "LossSum"] | None = None
    """What was made of the hidden states, by name."""
    balance_sum: Tensor | None = None
    """float32 scalar summed over tokens and MoE layers (see RouterStats); divide by the global number of tokens."""
    z_sum: Tensor | None = None
    """float32 scalar, in the same way."""
    expert_counts: Tensor | None = None
    """(M, E) int64: assignments to each expert of each MoE layer in this call."""
    rejected: Tensor | None = None
    """int64 scalar: those of them that found their expert full; None where experts have no capacity."""

    routes: "Mapping[int, RouteCounts] | None" = None
    """What routed layers report, by their numbers, in training."""

    @property
    def router(self) -> "RouterStats | None":
        """What the MoE layers reported, all together; None without such layers."""
        if self.balance_sum is None or self.z_sum is None or self.expert_counts is None:
            return None
        return RouterStats(self.balance_sum, self.z_sum, self.expert_counts, self.rejected)
