"""What a model is trained for: named losses, each a sum over its own targets and a mean over its own count.

The loss of a step is the sum over its objectives of weight x sum / N, where sum and N (the objective's count) are those
of the whole step, over all micro-batches and ranks: whatever the layout, every target weighs the same. Where targets
have weights, N is the sum of these. A step without any target has N = 0 and the loss 0, and its gradient is 0.

There are two kinds. An `Objective` reads the final hidden states; with a pipeline the last stage has it. A
`LayerObjective` reads what the layers report of themselves; each stage has those of its own layers.

To add one: a subclass of `Objective` in a file of your own, `register(name, factory)` at the end of it, the file under
`extensions` and `name: {options}` under `train.objectives` in the run config; the options are the factory's arguments.

Shapes: B rows, T tokens of a row, D model width.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm.args import ModelArgs
from llm.batch import Batch, Counts, Targets
from llm.datatypes import LossSum, RouterStats
from llm.heads import Losses
from llm.model import LLM


class Named(ABC):
    """What all objectives have."""

    name: str
    """`NAME_loss` in metrics.jsonl is its mean times its weight."""
    weight: float = 1.0

    @abstractmethod
    def count(self, batch: Batch) -> float:
        """What the batch adds to the number that the sum is divided by; on the CPU, before the step."""


class Objective(Named):
    """A loss over the final hidden states; ranks that share a batch have the same."""

    measures: tuple[str, ...] = ()
    """What it says besides its loss, each as a mean over the same count: `NAME_MEASURE` in metrics.jsonl, and in a
    validation, where it is the main objective, `valid_MEASURE`."""

    held_out_measures: tuple[str, ...] = ()
    """What it says besides where gradients are off, among the measures of its losses: in a validation too."""

    predicts: bool = False
    """Whether it predicts whole documents, or values: where gradients are off, its losses have `predictions`."""

    head_calls: int = 1
    """How often a training micro-batch passes the output matrix, once of them with a gradient."""

    def n_outputs(self, args: ModelArgs) -> int:
        """What it predicts of a document, where it predicts them."""
        return args.n_prediction

    def n_targets(self, batch: Batch) -> int:
        """How many targets the batch has, for the metrics; on the CPU."""
        return int(self.count(batch))

    @abstractmethod
    def loss_sum(self, model: LLM, hidden_BTD: Tensor, batch: Batch) -> LossSum:
        """The sum over the batch, which lies on the model's device.

        With tensor parallelism the gradient of hidden_BTD is one rank's term of a sum over ranks, as `model.loss_sum`
        and `model.logits` make it; for what is computed of it directly, alike on all ranks, take
        `model.replicated(hidden_BTD)`.
        """


class TokenObjective(Objective):
    """Cross entropy, in nats, of the tokens that `targets` says. Where the main objective is such a one, there are
    losses by source, and a step can be replayed.
    """

    @abstractmethod
    def targets(self, batch: Batch) -> Targets:
        """The token at each position that has one, on the device of the batch."""

    def count(self, batch: Batch) -> float:
        return self.targets(batch).weight()

    def n_targets(self, batch: Batch) -> int:
        return self.targets(batch).count()

    def loss_sum(self, model: LLM, hidden_BTD: Tensor, batch: Batch) -> LossSum:
        targets = self.targets(batch)
        nll_BT = torch.zeros_like(targets.labels, dtype=torch.float32)
        total = model.loss_sum(hidden_BTD, targets.labels, factors_BT=targets.weights, nll_BT=nll_BT)
        return LossSum(total, nll_BT if targets.weights is None else nll_BT * targets.weights)


class LayerObjective(Named):
    """A loss that the layers report, with its coefficient already in it."""

    def count(self, batch: Batch) -> float:
        """Tokens: of an encoder-decoder those of both sides, each of which passes the layers of its side."""
        return batch.n_tokens_of_both

    @abstractmethod
    def loss_sum(self, stats: RouterStats) -> Tensor:
        """The sum over the batch and the layers that `stats` is of, float32 scalar."""


def measured_as(objective: str, measure: str) -> str:
    """What a measure of an objective is called in metrics.jsonl."""
    return f"{objective}_{measure}"


class Objectives:
    """All that a model is trained for; the main ones, which a validation measures, are the first of each task."""

    def __init__(
        self,
        final: Sequence[Objective],
        layers: Sequence[LayerObjective] = (),
        mains: Sequence[Objective] | None = None,
    ) -> None:
        """mains: those of `final` that are the main one of a task; None: the first. ValueError where two have the same
        name, or none reads the final hidden states.
        """
        self.final, self.layers = tuple(final), tuple(layers)
        self.mains = self.final[:1] if mains is None else tuple(mains)
        self._all: tuple[Named, ...] = (*self.final, *self.layers)
        names = [objective.name for objective in self._all]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice or not self.final:
            raise ValueError(f"two objectives are called {twice[0]}" if twice else "there is no objective to train for")
        self.weights = {objective.name: objective.weight for objective in self._all}
        self.measured = {measured_as(o.name, measure): o.name for o in self.final for measure in o.measures}
        """The objective of each measure, whose names are those of metrics.jsonl."""

    @property
    def main(self) -> Objective:
        """That of the only task, or of the first."""
        return self.final[0]

    @property
    def of_tokens(self) -> tuple[TokenObjective, ...]:
        """The main ones that are losses of tokens."""
        return tuple(objective for objective in self.mains if isinstance(objective, TokenObjective))

    def count(self, batches: Sequence[Batch], sources: Sequence[str] = ()) -> Counts:
        """What the batches add to the counts of a step. sources: names of the data's, where there are several."""
        counted = {o.name: sum(o.count(batch) for batch in batches) for o in self._all}
        n_targets = sum(objective.n_targets(batch) for objective in self.mains for batch in batches)
        by_source = self._by_source(batches, sources)
        return Counts(sum(batch.n_tokens_of_both for batch in batches), n_targets, counted, by_source)

    def _by_source(self, batches: Sequence[Batch], sources: Sequence[str]) -> dict[str, float]:
        if len(sources) < 2 or not self.of_tokens:
            return {}
        totals = np.zeros(len(sources), dtype=np.float64)
        for batch in batches:
            assert batch.rows is not None
            source_R = batch.rows.source
            for objective in self.of_tokens:
                weight_R = objective.targets(batch).weight_of_each().view(len(source_R), -1).sum(1).numpy()
                np.add.at(totals, source_R[source_R >= 0], weight_R[source_R >= 0])
        return dict(zip(sources, totals.tolist(), strict=True))

    def losses_of(self, model: LLM, batch: Batch) -> Losses:
        """Makes the sums of those over the final hidden states, by name, the main one first, of a batch on the model's
        device.
        """
        return lambda hidden_BTD: {o.name: o.loss_sum(model, hidden_BTD, batch) for o in self.final}

    def layer_sums(self, stats: RouterStats) -> dict[str, Tensor]:
        """The sums of those that layers report, by name."""
        return {objective.name: objective.loss_sum(stats) for objective in self.layers}


class NextToken(TokenObjective):
    """Cross entropy of the batch's targets of the objective's own name: with `lm`, of the next tokens."""

    def __init__(self, name: str, weight: float = 1.0) -> None:
        self.name, self.weight = name, weight

    def targets(self, batch: Batch) -> Targets:
        return batch.targets[self.name]


class GuessedTokens(NextToken):
    """The same; in a validation also the share of the targets that are the likeliest tokens."""

    held_out_measures = ("acc",)

    def loss_sum(self, model: LLM, hidden_BTD: Tensor, batch: Batch) -> LossSum:
        found = super().loss_sum(model, hidden_BTD, batch)
        if torch.is_grad_enabled():
            return found
        targets = self.targets(batch)
        hits_BT = model.token_hits(hidden_BTD, targets.labels)
        return found._replace(measures={"acc": (hits_BT * targets.weight_of_each()).sum().float()})


class RouterBalance(LayerObjective):
    """The balance loss of MoE layers (model.moe.aux_alpha)."""

    name = "moe_balance"

    def loss_sum(self, stats: RouterStats) -> Tensor:
        return stats.balance_sum


class RouterZ(LayerObjective):
    """The z-loss of MoE layers (model.moe.z_alpha)."""

    name = "moe_z"

    def loss_sum(self, stats: RouterStats) -> Tensor:
        return stats.z_sum


FACTORIES: dict[str, Callable[..., Objective]] = {}
"""Of objectives that a config may name."""


def register(name: str, factory: Callable[..., Objective]) -> None:
    """Make an objective known under `name`, which is also its own; a factory is called with the options of the config.
    ValueError where the name is taken.
    """
    if name in FACTORIES:
        raise ValueError(f"an objective is called {name} already")
    FACTORIES[name] = factory


def make_objective(name: str, options: Mapping[str, Any]) -> Objective:
    """The objective of a name. ValueError with what is possible where the name or an option is not known."""
    key = f"train.objectives.{name}"
    if name not in FACTORIES:
        known = ", ".join(sorted(FACTORIES)) or "none; a file under `extensions` registers them"
        raise ValueError(f"{key}: no such objective; known are {known}")
    factory = FACTORIES[name]
    try:
        inspect.signature(factory).bind(**options)
    except TypeError as error:
        raise ValueError(f"{key}={dict(options)}: {error}; the options are {_options(factory)}") from None
    made = factory(**options)
    if made.name != name:
        raise ValueError(f"{key}: the objective that is registered so calls itself {made.name}")
    return made


def _options(factory: Callable[..., Objective]) -> str:
    return ", ".join(map(str, inspect.signature(factory).parameters.values())) or "none"


def objectives_of(
    main: Sequence[Objective],
    extra: Mapping[str, Mapping[str, Any]] | None = None,
    mains: Sequence[Objective] | None = None,
) -> Objectives:
    """The objectives of tasks, those that the config adds (name -> options), and those of the layers. mains: as of
    `Objectives`.

    ValueError naming the config's key where one cannot be made.
    """
    added = [make_objective(name, options) for name, options in (extra or {}).items()]
    return Objectives([*main, *added], [RouterBalance(), RouterZ()], mains)
