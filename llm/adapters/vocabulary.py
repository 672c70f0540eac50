"""Weights of a model with more tokens than the one that they come from: rows of new tokens are the mean of the old ones
(Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models").
"""

import torch
from torch import Tensor

from llm.args import ModelArgs
from llm.boxes import Box, box_shape
from llm.checkpoint.weights import Weights

TABLES = ("tok_embeddings.weight", "output.weight")
CHUNK_ELEMENTS = 2 << 20
"""Elements of a table that are read at a time for its mean."""


class Enlarged:
    """The weights of a model that has `vocab_size` tokens in place of fewer."""

    def __init__(self, weights: Weights, args: ModelArgs) -> None:
        """args: of the model that the weights are of."""
        self._weights, self._rows, self._dim = weights, args.vocab_size, args.dim
        self._means: dict[str, Tensor] = {}

    def read(self, name: str, box: Box, out: Tensor) -> Tensor:
        (first, last), *rest = box
        if name not in TABLES or last <= self._rows:
            return self._weights.read(name, box, out)
        held = max(min(last, self._rows) - first, 0)
        if held:
            self._weights.read(name, ((first, first + held), *rest), out[:held])
        ((low, high),) = rest
        out[held:] = self._mean(name)[low:high].to(out.dtype)
        return out

    def _mean(self, name: str) -> Tensor:
        """Of all rows, float32, summed in float64 in their order."""
        if name not in self._means:
            total = torch.zeros(self._dim, dtype=torch.float64)
            step = max(1, CHUNK_ELEMENTS // self._dim)
            for low in range(0, self._rows, step):
                box = (low, min(low + step, self._rows)), (0, self._dim)
                total += self._weights.read(name, box, torch.empty(box_shape(box))).sum(0, dtype=torch.float64)
            self._means[name] = (total / self._rows).float()
        return self._means[name]


def grown(args: ModelArgs, weights: Weights, vocab_size: int) -> tuple[ModelArgs, Weights]:
    """A model with so many tokens, where that is more than it has."""
    if vocab_size <= args.vocab_size:
        return args, weights
    return args.model_copy(update={"vocab_size": vocab_size}), Enlarged(weights, args)
