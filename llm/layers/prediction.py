"""The prediction head: classes, labels or values of a document, of one vector of it.

Shapes: S documents, D model width, n outputs.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.args import ModelArgs
from llm.layers.parameter import ZEROS, ParamInfo, Rows, weights

PREDICTION = "prediction"
"""What a model calls it."""


class PredictionHead(nn.Module):
    """A linear map from D to n with a bias, whole on every rank."""

    def __init__(self, dim: int, n_outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_outputs, dim))
        self.bias = nn.Parameter(torch.empty(n_outputs))

    @staticmethod
    def declare(args: ModelArgs) -> Rows:
        """All ranks of a tensor-parallel group compute it alike, of hidden states that are whole. One vector of a
        document meets it, which of the work for a token is next to nothing."""
        weight = ParamInfo(
            (args.n_prediction, args.dim),
            "head",
            weights(args),
            in_region=False,
            alike=True,
            decay=True,
            active=0.0,
            beside_adapters=True,
        )
        return {"weight": weight, "bias": replace(weight, shape=weight.shape[:1], kind="bias", init=ZEROS, decay=False)}

    def forward(self, pooled_SD: Tensor) -> Tensor:
        """(S, n) float32: logits, or scaled values."""
        return F.linear(pooled_SD.to(self.weight.dtype), self.weight, self.bias).float()


def scaled(args: ModelArgs, values_SL: Tensor) -> Tensor:
    """Values in the units of labels as a regression learns them."""
    return (values_SL - _row(args.prediction_mean, 0.0, values_SL)) / _row(args.prediction_std, 1.0, values_SL)


def in_units_of_labels(args: ModelArgs, predictions_SL: Tensor) -> Tensor:
    """What a regression predicts, in the units of labels."""
    std, mean = (_row(args.prediction_std, 1.0, predictions_SL), _row(args.prediction_mean, 0.0, predictions_SL))
    return predictions_SL * std + mean


def _row(numbers: tuple[float, ...] | None, otherwise: float, like: Tensor) -> Tensor:
    return like.new_tensor((otherwise,) if numbers is None else numbers)
