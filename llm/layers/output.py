"""The output matrix, which knows the loss: logits of a long batch never exist as a whole.

Shapes: B batch, T tokens, D model width, V vocabulary.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.args.lora import LoraArgs, adapter
from llm.init import Draw
from llm.kernels.cross_entropy import capped, lm_loss_sum, token_hits, token_nll
from llm.layers.lora import Adapted, VocabularyAdapted, adapter_rows, token_row_rows
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
    hits: bool = False
    """Return whether each label is the likeliest token, (B, T)."""


class Output(VocabularyAdapted):
    """The output matrix (V, D): see `predict` for what it returns."""

    vocabulary: VocabularyShare | None = None

    def __init__(
        self,
        dim: int,
        vocab_size: int,
        softcap: float | None = None,
        lora: LoraArgs | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))
        self.add_adapter(adapter(lora, "output"), dim, vocab_size)
        self.add_token_rows(lora, dim)
        self.softcap, self.scale_of_logits = softcap, scale

    @staticmethod
    def declare_head(dim: int, vocab_size: int, init: Draw, lora: LoraArgs | None = None) -> Rows:
        """The outputs are cut by tensor parallelism."""
        weight = ParamInfo((vocab_size, dim), "head", init, tensor_dim=0, decay=True)
        return {"weight": weight} | adapter_rows(weight, adapter(lora, "output")) | token_row_rows(weight, lora)

    def forward(self, hidden_BTD: Tensor, targets: HeadTargets | None = None) -> Tensor:
        weight, hidden_BTD = head_weight(self, self.vocabulary), scaled(hidden_BTD, self.scale_of_logits)
        return predict(hidden_BTD, weight, targets, self.vocabulary, self.softcap, adapter_of(self, hidden_BTD))


def scaled(hidden_BTD: Tensor, scale: float | None) -> Tensor:
    """What gives logits times a factor."""
    return hidden_BTD if scale is None else hidden_BTD * scale


def head_weight(head: VocabularyAdapted, vocabulary: VocabularyShare | None) -> Tensor:
    """This rank's rows, with what is added to those that train whole."""
    return head.with_token_rows(head.weight, 0 if vocabulary is None else vocabulary.first)


def adapter_of(head: Adapted, hidden_BTD: Tensor) -> tuple[Tensor, Tensor] | None:
    """s A x of an adapter, (B, T, r), and its B (V, r); None where the output matrix has none."""
    return None if head.lora_b is None else (head.narrowed(hidden_BTD), head.lora_b)


def predict(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    targets: HeadTargets | None,
    vocabulary: VocabularyShare | None,
    softcap: float | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Float32 logits (B, T, V); given targets, the sum of their negative log-likelihood, or each one's, or hits (see
    llm/kernels/cross_entropy.py).

    With an adapter the loss is that of one wider product, [x, s A x] with [W, B], so that it needs no other kernel.
    """
    if targets is None:
        logits = F.linear(hidden_BTD, weight_VD)
        if adapter is not None:
            logits = logits + F.linear(*adapter)
        logits = capped(logits.float(), softcap)
        return logits if vocabulary is None else vocabulary.join(logits)
    if adapter is not None:
        hidden_BTD, weight_VD = torch.cat([hidden_BTD, adapter[0]], -1), torch.cat([weight_VD, adapter[1]], 1)
    labels_BT, factors_BT, nll_BT, each, hits = targets
    if hits:
        return token_hits(hidden_BTD, weight_VD, labels_BT, vocabulary)
    if each:
        return token_nll(hidden_BTD, weight_VD, labels_BT, vocabulary, softcap)
    return lm_loss_sum(hidden_BTD, weight_VD, labels_BT, vocabulary, softcap, factors_BT=factors_BT, nll_BT=nll_BT)
