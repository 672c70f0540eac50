"""Tasks over values: a regression, whose labels are of whole samples, and the next values of series.

Both losses are the sum of the squares of what scaled values are off, over targets and the numbers of each, divided by
how many of these numbers there are in the whole step: in a regression each times its sample's weight, and without those
that are missing (NaN). A sample's labels stand at its first position, as the values `prediction.0` and so on; the next
values of a step stand at it, as `autoregressive.0` and so on.

How values are scaled is learned from the training rows: each number that is read, and each that is predicted, has mean
0 and standard deviation 1 over them. Of a series both are the same.

Shapes: B rows, T positions of a row, S samples, or steps with a next one, O numbers that are predicted, n steps.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llm.args import ModelArgs
from llm.args.model import OF_VALUES
from llm.batch import Batch
from llm.data.labelled_rows import PREDICTION, LabelledRows
from llm.data.learned import Scaling, scaling, scaling_of
from llm.data.mixture import Mixture
from llm.data.series_rows import NEXT, SeriesRows
from llm.datatypes import LossSum, Predictions
from llm.layers.features import in_units, scaled
from llm.model import LLM
from llm.objectives import Objective
from llm.parallel.launch.world import World
from llm.parallel.replica import Predicted
from llm.prediction_scores import SCORES
from llm.tasks.base import Args, OpenedRows, RowsWanted, Task
from llm.tasks.prediction import FIELDS, numbers_of
from llm.tasks.rows import opened_rows
from llm.tokenizer import Tokenizer

SCORED = FIELDS["regression"]


class ValueObjective(Objective):
    """The squares of what scaled values are off; its count is the weight of all numbers that are not missing."""

    predicts = True
    target: str
    """The targets of the rows, and what their values are called."""

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight

    def n_outputs(self, args: ModelArgs) -> int:
        assert args.output_dim is not None
        return args.output_dim

    def count(self, batch: Batch) -> float:
        known_BTO = ~numbers_of(batch, self.target).isnan()
        return float((batch.targets[self.target].weight_of_each() * known_BTO.sum(-1)).sum())

    def n_targets(self, batch: Batch) -> int:
        """Numbers that are not missing."""
        return int((~numbers_of(batch, self.target)[batch.targets[self.target].labels >= 0].isnan()).sum())

    def loss_sum(self, model: LLM, hidden_BTD: Tensor, batch: Batch) -> LossSum:
        """All places are predicted, so that nothing waits for what a device knows; those without a target weigh 0."""
        args, targets = model.args, batch.targets[self.target]
        predicted_SO, places_S = self.predicted(model, model.replicated(hidden_BTD), batch)
        numbers_SO = numbers_of(batch, self.target).flatten(0, 1).index_select(0, places_S)
        if numbers_SO.shape[1] != args.output_dim:
            raise ValueError(f"targets have {numbers_SO.shape[1]} numbers; model.output_dim={args.output_dim}")
        missing_SO = numbers_SO.isnan()
        weight_S = targets.weight_of_each().view(-1).index_select(0, places_S).float()
        wanted_SO = scaled(numbers_SO.masked_fill(missing_SO, 0), args.output_mean, args.output_std)
        off_SO = (predicted_SO - wanted_SO).square()
        total = (off_SO * weight_S[:, None].masked_fill(missing_SO, 0)).sum()
        if torch.is_grad_enabled():
            return LossSum(total)
        there_S = targets.labels.view(-1).index_select(0, places_S) >= 0
        return LossSum(total, predictions=Predictions(predicted_SO[there_S], numbers_SO[there_S], places_S[there_S]))

    @abstractmethod
    def predicted(self, model: LLM, hidden_BTD: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Scaled values (S, O) float32 of all places, and where each of them has its target, (S,) among the flattened
        positions.
        """


class Regression(ValueObjective):
    """Labels of whole samples."""

    name, target = "regression", PREDICTION

    def predicted(self, model: LLM, hidden_BTD: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        starts_S = torch.from_numpy(batch.inputs.resolve()[1]).to(hidden_BTD.device)
        return model.pooled_values(hidden_BTD, batch.inputs, batch.keys_N), starts_S


class NextValues(ValueObjective):
    """The values of the next step of series."""

    name, target = "autoregressive", NEXT

    def predicted(self, model: LLM, hidden_BTD: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        places_N = torch.arange(batch.n_tokens, device=hidden_BTD.device)
        return model.values(hidden_BTD).flatten(0, 1), places_N


class ValueTask(Task):
    """What both have in common."""

    continues = False
    objective: type[ValueObjective]

    def objectives(self, options: Mapping[str, Any] | None = None) -> tuple[Objective, ...]:
        return (self.objective(),)

    def open_rows(self, wanted: RowsWanted, tokenizer: Tokenizer, world: World) -> OpenedRows:
        return opened_rows(wanted, tokenizer, world, self)

    def settle(self, args: Args, rows: OpenedRows, began_from: ModelArgs | None) -> Args:
        """How values are scaled: as `args` says; else as the model `began_from` does, if it has as many; else as the
        training rows say.
        """
        found = {key: getattr(args, key) for key in OF_VALUES}
        there = None if began_from is None or not _same_values(args, began_from) else began_from
        if there is not None:
            found = {key: getattr(there, key) if value is None else value for key, value in found.items()}
        if None in found.values() and there is None:
            read, predicted = self.scalings(rows.train)
            learned = {
                "input_mean": read.mean, "input_std": read.std,
                "output_mean": predicted.mean, "output_std": predicted.std,
            }  # fmt: skip
            found = {key: learned[key] if value is None else value for key, value in found.items()}
        return type(args).model_validate({**args.model_dump(), **found})

    @abstractmethod
    def scalings(self, rows: Mixture) -> tuple[Scaling, Scaling]:
        """Of what is read, and of what is predicted, in the training rows."""

    def counter(self, tokenizer: Tokenizer) -> Callable[[Batch], list[float]]:
        """The weight of the numbers that are not missing."""
        count = self.objective().count
        return lambda batch: [count(batch)]

    def metrics(self, loss_sum: float, counts: Sequence[float]) -> dict[str, float]:
        """The mean square of what scaled values are off."""
        return {"valid_loss": loss_sum / counts[0]}

    def scores(self, args: ModelArgs, predicted: Predicted) -> dict[str, float | None]:
        """In the units of the data; whatever the weights of samples."""
        outputs_SO = torch.from_numpy(predicted.outputs_Sn)
        answers_SO = in_units(outputs_SO, args.output_mean, args.output_std).numpy()
        of_kind = SCORES["regression"]
        return {f"valid_{field}": of_kind[name](predicted.labels_SL, answers_SO) for field, name in SCORED.items()}

    def fields(self, args: ModelArgs) -> tuple[str, ...]:
        return ("loss", *SCORED)


class RegressionTask(ValueTask):
    name, target, objective = "regression", PREDICTION, Regression

    def scalings(self, rows: Mixture) -> tuple[Scaling, Scaling]:
        sources = [source for source in rows.sources if isinstance(source, LabelledRows)]
        return scaling_of([part for source in sources for part in source.features_kept()]), scaling(sources)


class AutoregressiveTask(ValueTask):
    name, target, objective = "autoregressive", NEXT, NextValues

    def scalings(self, rows: Mixture) -> tuple[Scaling, Scaling]:
        sources = [source for source in rows.sources if isinstance(source, SeriesRows)]
        found = scaling_of([part for source in sources for part in source.features_kept()])
        return found, found


def _same_values(one: ModelArgs, other: ModelArgs) -> bool:
    return (one.input_dim, one.output_dim) == (other.input_dim, other.output_dim)
