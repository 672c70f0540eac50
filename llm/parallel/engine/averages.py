"""The moving average of the weights, kept beside the masters, and lent to the model for a validation."""

import torch
from torch import Tensor


class Averages:
    """An average of each of this rank's flat masters; none where there is no decay."""

    def __init__(self, masters: list[Tensor], decay: float | None) -> None:
        self._decay = decay
        self._masters = masters
        self.flats = [] if decay is None else [flat.detach().clone() for flat in masters]
        self._of = dict(zip(map(id, masters), self.flats, strict=False))

    def of(self, master: Tensor) -> Tensor | None:
        """The average of one of the masters."""
        return self._of.get(id(master))

    @torch.no_grad()
    def update(self) -> None:
        """A step was applied."""
        if self._decay is not None:
            torch._foreach_lerp_(self.flats, [flat.detach() for flat in self._masters], 1 - self._decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Make the averages the masters, and the masters the averages; again to undo it."""
        for flat, average in zip(self._masters, self.flats, strict=True):
            kept = flat.detach().clone()
            flat.copy_(average)
            average.copy_(kept)
