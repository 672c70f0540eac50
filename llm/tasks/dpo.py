"""Preferences: direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290), with the sigmoid loss.

A row of data prefers one answer, the chosen one, to another, the rejected one. With s the model's summed
log-probability of an answer's targets and r that of the reference model, the margin of a pair is

    m = (s_chosen - r_chosen) - (s_rejected - r_rejected)

and its loss -(1 - e) log sigmoid(beta m) - e log sigmoid(-beta m), where e is the label smoothing. Both answers of a
pair lie in one row, so a rank has all of a pair that it has any of.

Shapes: B rows, T tokens of a row, S slots of a row, one for each answer.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm.args import ModelArgs
from llm.batch import Batch
from llm.data.packed import PAIR
from llm.datatypes import LossSum
from llm.model import LLM
from llm.objectives import Objective
from llm.parallel.launch.world import World
from llm.tasks.base import REFERENCE, OpenedRows, RowsWanted
from llm.tasks.lm import LanguageModelling
from llm.tasks.rows import opened_rows
from llm.tokenizer import Tokenizer


class Preference(Objective):
    """The loss of pairs. Its count is pairs; beside it the mean margin of rewards, beta m, and the share of pairs where
    that is above 0.
    """

    name = "dpo"
    measures = ("margin", "accuracy")
    head_calls = 2

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0) -> None:
        self.beta, self.label_smoothing = beta, label_smoothing

    def count(self, batch: Batch) -> float:
        return int(batch.values[PAIR].amax(1).clamp(min=0).sum())

    def n_targets(self, batch: Batch) -> int:
        return batch.targets[self.name].count()

    def loss_sum(self, model: LLM, hidden_BTD: Tensor, batch: Batch) -> LossSum:
        """The gradient of a pair's loss with respect to the answers' sums is known once these are: the head then sums
        the targets' log-probabilities with it as their factors, which never holds the logits of a whole batch.
        """
        labels_BT, pair_BT = batch.targets[self.name].labels, batch.values[PAIR].long()
        with torch.no_grad():
            nll_BT = model.token_nll(hidden_BTD, labels_BT)
            margin_BS, present_BS = margins(nll_BT + batch.values[REFERENCE], pair_BT)
            reward_BS = self.beta * margin_BS
            loss_BS = -(1 - self.label_smoothing) * F.logsigmoid(reward_BS)
            loss_BS -= self.label_smoothing * F.logsigmoid(-reward_BS)
            of_each = {"loss": loss_BS, "margin": reward_BS, "accuracy": (reward_BS > 0).double()}
            measures = {name: x_BS.where(present_BS, 0).sum().float() for name, x_BS in of_each.items()}
            total = measures.pop("loss")
        if torch.is_grad_enabled():
            # with respect to the margin; a target of the chosen answer has it with the sign of its log-probability
            slope_BS = self.beta * (self.label_smoothing - torch.sigmoid(-reward_BS))
            slope_BT = slope_BS.gather(1, pair_BT.abs()).float() * -pair_BT.sign()
            surrogate = model.loss_sum(hidden_BTD, labels_BT, factors_BT=slope_BT)
            total = _WithGradientOf.apply(total, surrogate)
        return LossSum(total, measures=measures)


def margins(nll_BT: Tensor, pair_BT: Tensor) -> tuple[Tensor, Tensor]:
    """The margin of each pair, (B, S) float64, slot p being the p-th pair of the row, and whether there is such a pair,
    (B, S). nll_BT: what is summed over an answer, negative log-probability plus the reference's sum.

    Sums are float64: added up in another order, as a GPU may do, they are the same once rounded.
    """
    n_rows, length = pair_BT.shape
    sums = torch.zeros(n_rows, length + 1, dtype=torch.float64, device=pair_BT.device)
    sums.scatter_add_(1, pair_BT.abs(), nll_BT.double() * -pair_BT.sign())
    slots = torch.arange(length + 1, device=pair_BT.device)
    return sums, (slots >= 1) & (slots <= pair_BT.amax(1, keepdim=True))


class _WithGradientOf(torch.autograd.Function):
    """A value as it is; its gradient goes to another scalar, whose own value does not matter."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, other: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


class Preferences(LanguageModelling):
    name = "dpo"
    compares_with_start = True

    def objectives(self, options: Mapping[str, Any] | None = None) -> tuple[Objective, ...]:
        return (Preference(**(options or {})),)

    def open_rows(self, wanted: RowsWanted, tokenizer: Tokenizer, world: World) -> OpenedRows:
        return opened_rows(wanted, tokenizer, world, self)

    def counter(self, tokenizer: Tokenizer) -> Callable[[Batch], list[float]]:
        """Pairs."""
        count = Preference().count
        return lambda batch: [count(batch)]

    def metrics(self, loss_sum: float, counts: Sequence[float]) -> dict[str, float]:
        """Loss per pair."""
        return {"valid_loss": loss_sum / counts[0]}

    def fields(self, args: ModelArgs) -> tuple[str, ...]:
        return ("loss", *Preference.measures)
