"""The token table, which may be the output matrix too."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.init import Draw
from llm.layers.output import HeadTargets, predict
from llm.layers.parameter import ParamInfo, Rows
from llm.layers.region import VocabularyShare


class Embedding(nn.Module):
    """Rows of a (vocab_size, dim) table; with a share of it, zeros for the tokens of other ranks."""

    vocabulary: VocabularyShare | None = None

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))

    @staticmethod
    def declare(vocab_size: int, dim: int, init: Draw, tied: bool = False) -> Rows:
        """Its rows are cut by tensor parallelism. tied: it is the output matrix too."""
        return {"weight": ParamInfo((vocab_size, dim), "embedding", init, tensor_dim=0, active=float(tied))}

    def forward(self, tokens: Tensor) -> Tensor:
        if self.vocabulary is None:
            return F.embedding(tokens, self.weight)
        row = tokens - self.vocabulary.first
        elsewhere = (row < 0) | (row >= len(self.weight))
        return F.embedding(row.masked_fill(elsewhere, 0), self.weight).masked_fill(elsewhere.unsqueeze(-1), 0)


class TiedEmbedding(Embedding):
    """A token table that is the output matrix too: given token ids it returns rows, given hidden states what Output
    returns."""

    def __init__(self, vocab_size: int, dim: int, softcap: float | None = None) -> None:
        super().__init__(vocab_size, dim)
        self.softcap = softcap

    def forward(self, x: Tensor, targets: HeadTargets | None = None) -> Tensor:
        if x.is_floating_point():
            return predict(x, self.weight, targets, self.vocabulary, self.softcap)
        return super().forward(x)
