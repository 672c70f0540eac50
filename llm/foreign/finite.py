"""Weights that are not finite, as an overflow in half precision or a damaged merge leaves them: found while they are
read."""

from collections.abc import Iterator

import torch
from torch import Tensor

from llm.boxes import Box
from llm.errors import UserError
from llm.foreign.load import ForeignWeights

SHOWN = 4
CHUNK = 2 << 20
"""Values looked at at a time: their flags are memory too."""


class FiniteWeights:
    """Weights that are looked at as they are read. UserError naming all foreign tensors with a NaN or an infinity,
    unless they are allowed; then `found` has a line for each of them that was read."""

    def __init__(self, weights: ForeignWeights, allowed: bool = False) -> None:
        self.weights = weights
        self.found: dict[str, str] = {}
        self._allowed = allowed

    def read(self, name: str, box: Box, out: Tensor) -> Tensor:
        self.weights.read(name, box, out)
        if not is_finite(out):  # or rounded to infinity, which is another's to refuse
            names = [name] if self._allowed else self.weights.names()
            self.found |= {key: line for each in names for key, line in self._lines(each)}
            if self.found and not self._allowed:
                lines = list(self.found.values())
                more = f" and {len(lines) - SHOWN} more tensors" if len(lines) > SHOWN else ""
                raise UserError(
                    f"{self.weights.source.name}: {'; '.join(lines[:SHOWN])}{more}: such a model answers nothing; "
                    f"--allow_nonfinite imports it as it is"
                )
        return out

    def _lines(self, name: str) -> Iterator[tuple[str, str]]:
        counts: dict[str, tuple[int, int, int]] = {}
        for key, values in self.weights.values_of(name, CHUNK):
            nan, infinite, n = counts.get(key, (0, 0, 0))
            counts[key] = nan + int(values.isnan().sum()), infinite + int(values.isinf().sum()), n + values.numel()
        for key, (nan, infinite, n) in counts.items():
            if nan + infinite:
                yield key, f"{key} holds {nan:,} NaN and {infinite:,} infinite of {n:,} values"


def is_finite(x: Tensor) -> bool:
    """Whether all values are, looking at some rows at a time."""
    if x.ndim == 0 or x.numel() <= CHUNK:
        return bool(x.isfinite().all())
    step = max(1, CHUNK * x.shape[0] // x.numel())
    return all(bool(part.isfinite().all()) for part in torch.split(x, step))
