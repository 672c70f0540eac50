"""Objectives as a user adds them, with targets and counts of their own: the token after the next one, and the size of
the final hidden states, which is computed alike on all tensor-parallel ranks.

    extensions: [docs/extend/two_ahead.py]
    train: {objectives: {two_ahead: {weight: 0.3}, small_hidden: {}}}

Their means, times their weights, are `two_ahead_loss` and `small_hidden_loss` in metrics.jsonl.

Shapes: B rows, T tokens of a row, D model width.
"""

import torch
from torch import Tensor

from llm.batch import IGNORE, Batch, Targets
from llm.datatypes import LossSum
from llm.model import LLM
from llm.objectives import Objective, TokenObjective, register


class TwoAhead(TokenObjective):
    """Cross entropy of the token after the next one, where both lie in the same document and sequence."""

    name = "two_ahead"

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight

    def targets(self, batch: Batch) -> Targets:
        next_BT = batch.targets["lm"].labels
        labels_BT = torch.full_like(next_BT, IGNORE)
        labels_BT[:, :-1] = torch.where(next_BT[:, :-1] >= 0, next_BT[:, 1:], IGNORE)
        return Targets(labels_BT)


class SmallHidden(Objective):
    """Mean square of the hidden states of all tokens."""

    name = "small_hidden"

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight

    def count(self, batch: Batch) -> int:
        return batch.n_tokens

    def loss_sum(self, model: LLM, hidden_BTD: Tensor, batch: Batch) -> LossSum:
        return LossSum(model.replicated(hidden_BTD).float().square().mean(-1).sum())


register(TwoAhead.name, TwoAhead)
register(SmallHidden.name, SmallHidden)
