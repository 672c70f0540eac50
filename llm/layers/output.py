"""The output matrix, which knows the loss: logits of a long batch never exist as a whole.

Shapes: B batch, T tokens, D model width, V vocabulary.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from llm.init import Draw
from llm.kernels.cross_entropy import capped, lm_loss_sum, token_nll
from llm.layers.linear import Linear
from llm.layers.parameter import ParamInfo, Rows
from llm.layers.region import VocabularyShare


class HeadTargets(NamedTuple):
    """What an output matrix is to predict."""

    labels_BT: Tensor
    factors_BT: Tensor | None = None
    """Of each label's loss; None = 1."""
    nll_BT: Tensor | None = None
    """Is filled with each label's negative log-likelihood."""
    each: bool = False
    """Return the negative log-likelihood of each label, (B, T) without gradient, not their sum."""


class Output(Linear):
    """The output matrix (V, D): see `predict` for what it returns."""

    vocabulary: VocabularyShare | None = None

    def __init__(self, dim: int, vocab_size: int, softcap: float | None = None) -> None:
        super().__init__(dim, vocab_size)
        self.softcap = softcap

    @staticmethod
    def declare_head(dim: int, vocab_size: int, init: Draw) -> Rows:
        """The outputs are cut by tensor parallelism."""
        return {"weight": ParamInfo((vocab_size, dim), "head", init, tensor_dim=0, decay=True)}

    def forward(self, hidden_BTD: Tensor, targets: HeadTargets | None = None) -> Tensor:
        return predict(hidden_BTD, self.weight, targets, self.vocabulary, self.softcap)


def predict(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    targets: HeadTargets | None,
    vocabulary: VocabularyShare | None,
    softcap: float | None = None,
) -> Tensor:
    """Float32 logits (B, T, V); given targets, the sum of their negative log-likelihood, or each one's (see
    llm/kernels/cross_entropy.py)."""
    if targets is None:
        logits = capped(F.linear(hidden_BTD, weight_VD).float(), softcap)
        return logits if vocabulary is None else vocabulary.join(logits)
    labels_BT, factors_BT, nll_BT, each = targets
    if each:
        return token_nll(hidden_BTD, weight_VD, labels_BT, vocabulary, softcap)
    return lm_loss_sum(hidden_BTD, weight_VD, labels_BT, vocabulary, softcap, factors_BT=factors_BT, nll_BT=nll_BT)
