"""What a model is trained on: inputs, targets by name, and where the rows come from; and the counts of a whole step.

Shapes: B rows of the tensors, T tokens of a row, R rows of the data: B, or fewer where each was cut into several.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm.datatypes import TransformerInput

IGNORE = -100
"""Label of a token that is no target."""


@dataclass(frozen=True)
class Targets:
    """What is to be predicted at each token."""

    labels: Tensor
    """(B, T) int64; negative where there is no target."""
    weights: Tensor | None = None
    """(B, T) float32: factor of each label's loss, which counts in the denominator too; None = 1. Multiples of 1/1024,
    so that sums of them are exact in float64, in any order and however a batch is cut."""

    def count(self) -> int:
        """Number of labels that count."""
        return int((self.labels >= 0).sum())

    def weight(self) -> float:
        """Sum of the labels' weights: what the mean of their losses divides by; without weights their number."""
        return self.count() if self.weights is None else float(self.weight_of_each().sum())

    def weight_of_each(self) -> Tensor:
        """(B, T) float64: the weight of each label, 0 where there is none."""
        counts = (self.labels >= 0).double()
        return counts if self.weights is None else counts * self.weights

    def span(self, first: int, end: int) -> "Targets":
        """Those of some of the flattened tokens, as one row."""
        labels, weights = (None if x is None else x.reshape(1, -1)[:, first:end] for x in (self.labels, self.weights))
        assert labels is not None
        return Targets(labels, weights)

    def to(self, device: torch.device) -> "Targets":
        """The same on a device."""
        return Targets(self.labels.to(device), None if self.weights is None else self.weights.to(device))


@dataclass(frozen=True)
class Rows:
    """Which rows of the data a batch holds, each (R,) int64; -1 for a row that is not there, which is filled up."""

    source: NDArray[np.int64]
    """Number of the source."""
    row: NDArray[np.int64]
    """Number of the row in its source."""
    global_row: NDArray[np.int64]
    """Number of the row in the order of the data."""
    epoch: NDArray[np.int64]
    """Pass over the source, from 0, that the row is read in."""


@dataclass(frozen=True)
class Batch:
    """Rows that go through the model together; on the CPU as the data makes it."""

    inputs: TransformerInput
    targets: Mapping[str, Targets]
    """By name: what the objectives look for."""
    valid: Tensor | None = None
    """(B, T) bool: positions that hold data; None = all do."""
    rows: Rows | None = None
    """None: of no data that is known."""
    values: Mapping[str, Tensor] = field(default_factory=dict)
    """(B, T) float32 each: further numbers of each token, by name; 0 where there is none."""
    keys_N: Tensor | None = None
    """(B * T,) int64 on the model's device: of each token, by which dropout chooses; None outside of training, and
    where nothing is dropped."""

    @property
    def n_tokens(self) -> int:
        """Tokens, filling included."""
        return self.inputs.tokens.numel()

    @property
    def n_tokens_of_both(self) -> int:
        """Tokens of target and source, filling included; `n_tokens` where there is no source."""
        source = self.inputs.source
        return self.n_tokens + (0 if source is None else source.tokens.numel())

    @property
    def seq_len(self) -> int:
        """Tokens of a sequence, T."""
        return self.inputs.tokens.shape[1]

    def to(self, device: torch.device) -> "Batch":
        """The same on a device; boundaries of documents stay on the CPU, where the masks are made."""
        inputs = self.inputs
        position = inputs.tokens_position
        moved = replace(
            inputs,
            tokens=inputs.tokens.to(device),
            tokens_position=position.to(device) if isinstance(position, Tensor) else position,
            images=inputs.images_on(device),
            features=None if inputs.features is None else inputs.features.to(device),
            source=None if inputs.source is None else Batch(inputs.source, {}).to(device).inputs,
        )
        targets = {name: targets.to(device) for name, targets in self.targets.items()}
        values = {name: value.to(device) for name, value in self.values.items()}
        return Batch(moved, targets, None if self.valid is None else self.valid.to(device), self.rows, values)

    def without_images(self) -> "Batch":
        """The same without images, for what follows the token vectors."""
        return self if self.inputs.images is None else replace(self, inputs=replace(self.inputs, images=None))

    def span(self, first: int, end: int, patch_token: int | None = None) -> "Batch":
        """Some of the flattened tokens as one row, which is one document, with its source where there are any, and the
        images whose slots, tokens equal to `patch_token`, are among them. ValueError where an image's are not all.
        """
        tokens = self.inputs.tokens.reshape(1, -1)
        images = None if patch_token is None else self._images_of(tokens[0] == patch_token, first, end)
        causal = self.inputs.causal
        if isinstance(causal, Tensor):
            causal = bool(causal[first // self.seq_len])
        features = None if self.inputs.features is None else self.inputs.features.flatten(0, 1)[None, first:end]
        inputs = TransformerInput(
            tokens[:, first:end], images=images, causal=causal, features=features, source=self._source_of(first)
        )
        values = {name: value.reshape(1, -1)[:, first:end] for name, value in self.values.items()}
        targets = {name: targets.span(first, end) for name, targets in self.targets.items()}
        return Batch(inputs, targets, values=values)

    def _source_of(self, place: int) -> TransformerInput | None:
        """The source of the document in which a token stands, as one row."""
        source = self.inputs.source
        if source is None:
            return None
        (starts, _), (of_source, ends) = (_documents(inputs) for inputs in (self.inputs, source))
        row, length = place // self.seq_len, source.tokens.shape[1]
        number = int((starts <= place).sum()) - 1 - int((starts < row * self.seq_len).sum())
        document = int((of_source < row * length).sum()) + number
        first, end = int(of_source[document]), int(ends[document])
        features = None if source.features is None else source.features.flatten(0, 1)[None, first:end]
        return TransformerInput(source.tokens.reshape(1, -1)[:, first:end], features=features)

    def _images_of(self, is_slot_N: Tensor, first: int, end: int) -> Tensor | None:
        images = self.inputs.images
        if images is None:
            return None
        if not isinstance(images, Tensor):
            raise ValueError("images of a native vision tower cannot be cut with their batch")
        of_tile = int(is_slot_N.sum()) // len(images)
        (start, cut), (stop, cut_too) = (divmod(int(is_slot_N[:place].sum()), of_tile) for place in (first, end))
        if cut or cut_too:
            raise ValueError(f"tokens {first} to {end} of a batch begin or end inside an image")
        return images[start:stop] if stop > start else None


def _documents(inputs: TransformerInput) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where those begin and end, among the flattened tokens, that are not padding alone; padding stands last."""
    positions_BT, starts = inputs.resolve()
    ends = np.append(starts[1:], positions_BT.size)
    held = positions_BT.reshape(-1)[starts] >= 0
    return starts[held], ends[held]


@dataclass(frozen=True)
class Counts:
    """What the means of a step divide by. Of one rank, or of all ranks."""

    tokens: int
    """Filling included; of target and source, where there is one."""
    targets: int
    """Labels of the main objectives that count, whatever their weights."""
    objectives: Mapping[str, float]
    """What the mean of each divides by, by its name, the main one first: with `lm` the targets, or the sum of their
    weights. 0 where a step has no target: its mean is 0 then."""
    sources: Mapping[str, float]
    """Those of the main objectives by source; empty where there is one source only."""

    @property
    def main(self) -> float:
        """What the mean of the main objective divides by."""
        return next(iter(self.objectives.values()))

    def values(self) -> list[float]:
        """All numbers, to be summed over ranks."""
        return [self.tokens, self.targets, *self.objectives.values(), *self.sources.values()]

    def with_values(self, values: Sequence[float]) -> "Counts":
        """These names with other numbers, in the order of `values`."""
        tokens, targets, *rest = values
        n = len(self.objectives)
        return Counts(
            int(tokens),
            int(targets),
            dict(zip(self.objectives, rest[:n], strict=True)),
            dict(zip(self.sources, rest[n:], strict=True)),
        )
