"""The output matrix, which knows the loss: logits of a long batch never exist as a whole.

Shapes: B batch, T tokens, D model width, V vocabulary.
"""

import torch.nn.functional as F
from torch import Tensor

from llm.init import Draw
from llm.kernels.cross_entropy import capped, lm_loss_sum, token_nll
from llm.layers.linear import Linear
from llm.layers.parameter import ParamInfo, Rows
from llm.layers.region import VocabularyShare


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

    def forward(self, hidden_BTD: Tensor, labels_BT: Tensor | None = None, per_token: bool = False) -> Tensor:
        return predict(hidden_BTD, self.weight, labels_BT, per_token, self.vocabulary, self.softcap)


def predict(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    labels_BT: Tensor | None,
    per_token: bool,
    vocabulary: VocabularyShare | None,
    softcap: float | None = None,
) -> Tensor:
    """Float32 logits (B, T, V); given labels, the sum of their negative log-likelihood, or each one's (B, T) without
    gradient (see llm/kernels/cross_entropy.py)."""
    if labels_BT is None:
        logits = capped(F.linear(hidden_BTD, weight_VD).float(), softcap)
        return logits if vocabulary is None else vocabulary.join(logits)
    loss = token_nll if per_token else lm_loss_sum
    return loss(hidden_BTD, weight_VD, labels_BT, vocabulary, softcap)
