"""The only weight-by-activation products outside MoE experts: one Linear and one Embedding, and the output matrix,
which is either of both and knows the loss.

A weight is read in the forward of its own module only, so that whatever gathers weights around a module's call
(ZeRO-3) finds every use. Where weights are cut over ranks, a module holds its part and computes with that; what must
be summed or joined then is said in llm/layers/region.py.

Shapes: B batch, T tokens, D model width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.layers.region import VocabularyShare
from llm.losses import capped, lm_loss_sum, token_nll


class Linear(nn.Module):
    """y = x W^T + b with W (n_out, n_in), b (n_out,) only if asked for. They are left unset; llm/init.py fills them."""

    rows: slice | None = None
    """The outputs that this rank computes, where it holds the whole weight all the same."""
    adds_bias: bool = True
    """Whether this rank adds the bias, where the results of several ranks are summed: one of them does."""

    def __init__(self, n_in: int, n_out: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.bias = nn.Parameter(torch.empty(n_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if self.rows is not None:
            weight, bias = weight[self.rows], None if bias is None else bias[self.rows]
        if bias is not None and not self.adds_bias:
            bias = bias * 0  # so that it has a gradient here too, to be summed with the others'
        return F.linear(x, weight, bias)


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

    def __init__(self, dim: int, vocab_size: int, softcap: float | None = None) -> None:
        super().__init__(dim, vocab_size)
        self.softcap = softcap

    def forward(self, hidden_BTD: Tensor, labels_BT: Tensor | None = None, per_token: bool = False) -> Tensor:
        return predict(hidden_BTD, self.weight, labels_BT, per_token, self.vocabulary, self.softcap)


class TiedEmbedding(Embedding):
    """A token table that is the output matrix too: given token ids it returns rows, given hidden states what Output
    returns."""

    def __init__(self, vocab_size: int, dim: int, softcap: float | None = None) -> None:
        super().__init__(vocab_size, dim)
        self.softcap = softcap

    def forward(self, x: Tensor, labels_BT: Tensor | None = None, per_token: bool = False) -> Tensor:
        if x.is_floating_point():
            return predict(x, self.weight, labels_BT, per_token, self.vocabulary, self.softcap)
        return super().forward(x)


def predict(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    labels_BT: Tensor | None,
    per_token: bool,
    vocabulary: VocabularyShare | None,
    softcap: float | None = None,
) -> Tensor:
    """Float32 logits (B, T, V); given labels, the sum of their negative log-likelihood, or each one's (B, T) without
    gradient (see llm/losses.py)."""
    if labels_BT is None:
        logits = capped(F.linear(hidden_BTD, weight_VD).float(), softcap)
        return logits if vocabulary is None else vocabulary.join(logits)
    loss = token_nll if per_token else lm_loss_sum
    return loss(hidden_BTD, weight_VD, labels_BT, vocabulary, softcap)
