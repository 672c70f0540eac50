"""Prediction: classes, labels that are there or not, or values, of whole samples.

A sample is a document of its own in a row. At its first token stand the target 0 and its labels, the values
`prediction.0`, `prediction.1` and so on: the number of its class, or of each output a value, or 1 or 0 for a label that
is there or not. NaN is a label that is missing: it has no part in loss, count or metrics.

The loss is a sum over samples and their labels that are not missing, each times the sample's weight, and is divided by
the sum of these weights: cross entropy of classes, with e of a target's probability spread over all classes
(label_smoothing), the binary one of labels, the square of what scaled values are off.

Shapes: B rows, T tokens of a row, D model width, S samples (in a batch all documents, labelled or not), n outputs of
the head, L labels of a sample: 1 of a classification, else n.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm.args import ModelArgs
from llm.batch import Batch
from llm.data.learned import labelled_in
from llm.datatypes import LossSum, Predictions
from llm.layers.prediction import PREDICTION, answers_of, scaled
from llm.model import LLM
from llm.objectives import Objective
from llm.parallel.launch.world import World
from llm.parallel.replica import Predicted
from llm.prediction_scores import SCORES, of_one_value
from llm.tasks.base import Args, OpenedRows, RowsWanted, Task
from llm.tasks.rows import opened_rows
from llm.tasks.settle_labels import settled_labels
from llm.tokenizer import Tokenizer

FIELDS = {
    "classification": {
        "acc": "accuracy", "f1": "macro_f1", "roc_auc": "roc_auc", "average_precision": "average_precision"
    },
    "regression": {"rmse": "rmse", "mae": "mae", "r2": "r2"},
    "multilabel": {
        "roc_auc": "roc_auc", "average_precision": "average_precision", "acc": "accuracy", "f1": "macro_f1"
    },
}  # fmt: skip
"""Scores (llm/prediction_scores.py) of each kind of labels, by what a validation calls them."""
WITHOUT_BOTH = "labels_without_both"


class Prediction(Objective):
    """The loss of the labels of samples; its count is the weight of all labels that are not missing."""

    name = PREDICTION
    head_calls = 0
    predicts = True

    def __init__(self, label_smoothing: float = 0.0, weight: float = 1.0) -> None:
        self.label_smoothing, self.weight = label_smoothing, weight

    def count(self, batch: Batch) -> float:
        known_BTL = ~labels_of(batch).isnan()
        return float((batch.targets[self.name].weight_of_each() * known_BTL.sum(-1)).sum())

    def n_targets(self, batch: Batch) -> int:
        """Labels that are not missing."""
        labelled_BT = batch.targets[self.name].labels >= 0
        return int((~labels_of(batch)[labelled_BT].isnan()).sum())

    def loss_sum(self, model: LLM, hidden_BTD: Tensor, batch: Batch) -> LossSum:
        """All documents are predicted, so that nothing waits for what a device knows; those without labels weigh 0."""
        args, targets = model.args, batch.targets[self.name]
        predictions_Sn = model.predictions(model.replicated(hidden_BTD), batch.inputs, batch.keys_N)
        starts_S = torch.from_numpy(batch.inputs.resolve()[1]).to(hidden_BTD.device)
        labels_SL = labels_of(batch).flatten(0, 1).index_select(0, starts_S)
        _check(args, labels_SL, predictions_Sn)
        missing_SL = labels_SL.isnan()
        weight_S = targets.weight_of_each().view(-1).index_select(0, starts_S).float()
        loss_SL = self._losses(args, predictions_Sn, labels_SL.masked_fill(missing_SL, 0))
        total = (loss_SL * weight_S[:, None].masked_fill(missing_SL, 0)).sum()
        if torch.is_grad_enabled():
            return LossSum(total)
        labelled_S = targets.labels.view(-1).index_select(0, starts_S) >= 0
        found = Predictions(predictions_Sn[labelled_S], labels_SL[labelled_S], starts_S[labelled_S])
        return LossSum(total, predictions=found)

    def _losses(self, args: ModelArgs, predictions_Sn: Tensor, labels_SL: Tensor) -> Tensor:
        """Of each label, (S, L)."""
        if args.prediction == "multilabel":
            return F.binary_cross_entropy_with_logits(predictions_Sn, labels_SL, reduction="none")
        if args.prediction == "regression":
            return (predictions_Sn - scaled(args, labels_SL)).square()
        classes_S, e = labels_SL[:, 0].long(), self.label_smoothing
        return F.cross_entropy(predictions_Sn, classes_S, reduction="none", label_smoothing=e)[:, None]


def labels_of(batch: Batch) -> Tensor:
    """(B, T, L) float32: the labels of each sample at its first token; NaN = missing."""
    return numbers_of(batch, PREDICTION)


def numbers_of(batch: Batch, kind: str) -> Tensor:
    """(B, T, L) float32: the values `KIND.0`, `KIND.1` and so on of a batch."""
    names = sorted((name for name in batch.values if name.startswith(f"{kind}.")), key=_number)
    return torch.stack([batch.values[name] for name in names], -1)


def _number(name: str) -> int:
    return int(name.rpartition(".")[2])


def _check(args: ModelArgs, labels_SL: Tensor, predictions_Sn: Tensor) -> None:
    """ValueError where there are other labels than the head is for; what they are is looked at on a CPU alone, as it
    would stall a GPU.
    """
    expected = 1 if args.prediction == "classification" else predictions_Sn.shape[1]
    if labels_SL.shape[1] != expected:
        raise ValueError(
            f"samples have {labels_SL.shape[1]} labels; model.n_prediction={args.n_prediction} with "
            f"model.prediction={args.prediction} takes {expected}"
        )
    if labels_SL.device.type != "cpu" or args.prediction == "regression":
        return
    most = args.n_prediction - 1 if args.prediction == "classification" else 1
    wrong = (labels_SL < 0) | (labels_SL > most) | (labels_SL != labels_SL.floor())
    wrong &= ~labels_SL.isnan()
    if wrong.any():
        raise ValueError(
            f"label {float(labels_SL[wrong][0]):g}: model.prediction={args.prediction} takes whole numbers from 0 to "
            f"{most}"
        )


class PredictionTask(Task):
    name = PREDICTION
    continues = False

    def objectives(self, options: Mapping[str, Any] | None = None) -> tuple[Objective, ...]:
        return (Prediction((options or {}).get("label_smoothing", 0.0)),)

    def open_rows(self, wanted: RowsWanted, tokenizer: Tokenizer, world: World) -> OpenedRows:
        return opened_rows(wanted, tokenizer, world, self)

    def settle(self, args: Args, rows: OpenedRows, began_from: ModelArgs | None) -> Args:
        """Names of the outputs and the scaling of values, of the training rows."""
        held_out = [] if rows.valid is None else labelled_in(rows.valid.sources)
        return settled_labels(args, labelled_in(rows.train.sources), held_out, began_from)

    def counter(self, tokenizer: Tokenizer) -> Callable[[Batch], list[float]]:
        """The weight of the labels that are not missing."""
        count = Prediction().count
        return lambda batch: [count(batch)]

    def metrics(self, loss_sum: float, counts: Sequence[float]) -> dict[str, float]:
        """Loss per label."""
        return {"valid_loss": loss_sum / counts[0]}

    def scores(self, args: ModelArgs, predicted: Predicted) -> dict[str, float | None]:
        """In the units of labels; whatever the weights of samples."""
        outputs_Sn = torch.from_numpy(predicted.outputs_Sn)
        answers_Sn = answers_of(args, outputs_Sn).numpy()
        labels_SL, of_kind = predicted.labels_SL, SCORES[args.prediction]
        found: dict[str, float | None] = {
            f"valid_{field}": of_kind[name](labels_SL, answers_Sn) for field, name in FIELDS[args.prediction].items()
        }
        if args.prediction == "multilabel":
            found[f"valid_{WITHOUT_BOTH}"] = of_one_value(labels_SL)
        return found

    def fields(self, args: ModelArgs) -> tuple[str, ...]:
        return ("loss", *FIELDS[args.prediction], *[WITHOUT_BOTH] * (args.prediction == "multilabel"))
