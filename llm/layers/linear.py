"""The only weight-by-activation products outside MoE experts: one Linear and one Embedding, without biases, and the
output matrix, which is either of both and knows the loss.

A weight is read in the forward of its own module only, so that whatever gathers weights around a module's call
(ZeRO-3) finds every use. Where weights are cut over ranks, a module holds its part and computes with that; what must
be summed or joined then is said in llm/layers/region.py.

Shapes: B batch, T tokens, D model width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.layers.region import VocabularyShare
from llm.losses import lm_loss_sum, token_nll


class Linear(nn.Module):
    """y = x W^T with W (n_out, n_in). The weight is left unset; llm/init.py fills it."""

    rows: slice | None = None
    """The outputs that this rank computes, where it holds the whole weight all the same."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight if self.rows is None else self.weight[self.rows])


class Embedding(nn.Module):
    """Rows of a (vocab_size, dim) table; with a share of it, zeros for the tokens of other ranks."""

    vocabulary: VocabularyShare | None = None

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        if self.vocabulary is None:
            return F.embedding(tokens, self.weight)
        row = tokens - self.vocabulary.first
        elsewhere = (row < 0) | (row >= len(self.weight))
        return F.embedding(row.masked_fill(elsewhere, 0), self.weight).masked_fill(elsewhere.unsqueeze(-1), 0)


class Output(Linear):
    """The output matrix (V, D): see `predict` for what it returns."""

    vocabulary: VocabularyShare | None = None

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__(dim, vocab_size)

    def forward(self, hidden_BTD: Tensor, labels_BT: Tensor | None = None, per_token: bool = False) -> Tensor:
        return predict(hidden_BTD, self.weight, labels_BT, per_token, self.vocabulary)


class TiedEmbedding(Embedding):
    """A token table that is the output matrix too: given token ids it returns rows, given hidden states what Output
    returns."""

    def forward(self, x: Tensor, labels_BT: Tensor | None = None, per_token: bool = False) -> Tensor:
        if x.is_floating_point():
            return predict(x, self.weight, labels_BT, per_token, self.vocabulary)
        return super().forward(x)


def predict(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    labels_BT: Tensor | None,
    per_token: bool,
    vocabulary: VocabularyShare | None,
) -> Tensor:
    """Float32 logits (B, T, V); given labels, the sum of their negative log-likelihood, or each one's (B, T) without
    gradient (see llm/losses.py)."""
    if labels_BT is None:
        logits = F.linear(hidden_BTD, weight_VD).float()
        return logits if vocabulary is None else vocabulary.join(logits)
    loss = token_nll if per_token else lm_loss_sum
    return loss(hidden_BTD, weight_VD, labels_BT, vocabulary)
