"""The prediction head: classes, labels or values of a document, of one vector of it.

Shapes: S documents, D model width, n outputs.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.args import ModelArgs
from llm.datatypes import Ints, TransformerInput
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


def answers_of(args: ModelArgs, outputs_Sn: Tensor) -> Tensor:
    """What the outputs of the head say, (S, n): the probability of each class, or of each label, or values in the units
    of labels.
    """
    if args.prediction == "regression":
        return in_units_of_labels(args, outputs_Sn)
    return outputs_Sn.softmax(-1) if args.prediction == "classification" else outputs_Sn.sigmoid()


def documents_of(args: ModelArgs, texts: Sequence[Ints], device: torch.device) -> TransformerInput:
    """Texts in tokens side by side in one row, each a document of it, as the head reads them."""
    return TransformerInput(
        torch.from_numpy(np.concatenate(texts)).to(device)[None],
        cu_seqlens=torch.tensor([0, *np.cumsum([len(text) for text in texts]).tolist()]),
        causal=args.prediction_causal,
    )


def _row(numbers: tuple[float, ...] | None, otherwise: float, like: Tensor) -> Tensor:
    return like.new_tensor((otherwise,) if numbers is None else numbers)
