"""Losses of Hyformer: of logits that are there, each a mean over the targets that count.

A negative label is none (-1, -100), and so is a NaN where labels are floats. Without any target the loss is 0 and its
gradient too. Where a run trains, the objectives of llm/tasks take their place, whose denominators hold for all ranks.

Shapes: B rows, T tokens, V vocabulary, n outputs of a prediction head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100


def compute_lm_loss(logits: Tensor, labels: Tensor, shift_labels: bool = True) -> Tensor:
    """Mean cross entropy in nats of the next tokens, float32.

    logits: (B, T, V). labels: (B, T) integers: the row's own tokens, which are shifted here; with shift_labels=False
    labels[b, t] is the token after the t-th. ValueError where they do not fit together.
    """
    check_tokens(logits, labels)
    if shift_labels:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return _cross_entropy(logits, labels)


def compute_mlm_loss(
    logits: Tensor, labels: Tensor, vocab_size: int | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Mean cross entropy in nats of the tokens at positions that have a label, float32.

    logits: (B, T, V). labels: (B, T) integers, the original tokens at masked positions, negative elsewhere. vocab_size:
    V, where given. label_smoothing: the share of a target that all tokens have alike. ValueError where they do not fit
    together.
    """
    check_tokens(logits, labels)
    if vocab_size is not None and vocab_size != logits.shape[-1]:
        raise ValueError(f"vocab_size={vocab_size}, but logits are of {logits.shape[-1]} tokens")
    return _cross_entropy(logits, labels, label_smoothing)


def compute_prediction_loss(
    logits: Tensor, labels: Tensor, num_labels: int | None = None, multilabel: bool = False
) -> Tensor:
    """The loss of a prediction head's outputs (B, n), float32, a mean over labels that are not missing.

    num_labels: n, where given. labels decide what they are labels of: with `multilabel` (B, n) of 0 and 1, binary cross
    entropy; where n is 1, (B,) or (B, 1), and floats (B, n): values, squared error; (B,) otherwise: class indices,
    cross entropy. ValueError where they are of another kind or range.
    """
    if logits.ndim != 2:
        raise ValueError(f"logits of a prediction are (B, n); got {tuple(logits.shape)}")
    n = logits.shape[-1]
    if num_labels is not None and num_labels != n:
        raise ValueError(f"num_labels={num_labels}, but there are logits of {n}")
    if len(labels) != len(logits):
        raise ValueError(f"labels are of {len(labels)} rows, logits of {len(logits)}")
    if multilabel:
        return _multilabel(logits, labels)
    if n == 1 or labels.ndim == 2 and labels.is_floating_point():
        return _regression(logits, labels)
    return _classification(logits, labels)


def check_tokens(logits: Tensor, labels: Tensor) -> None:
    """ValueError unless labels are token ids of the rows that logits are of; how large they are only on a CPU, as
    looking at them would stall a GPU."""
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"labels {tuple(labels.shape)} are one for each token of logits (B, T, V) {tuple(logits.shape)}"
        )
    _check_integers(labels, "token ids")
    _check_below(labels, logits.shape[-1], "the vocabulary")


def _check_integers(labels: Tensor, what: str) -> None:
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, {what}; got {labels.dtype}")


def _check_below(labels: Tensor, n: int, what: str) -> None:
    if labels.device.type == "cpu" and labels.numel() and int(labels.max()) >= n:
        raise ValueError(f"a label is {int(labels.max())}, and {what} has {n}: labels are 0 to {n - 1}, or negative")


def _cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    labels = labels.long()
    kept = labels >= 0
    total = F.cross_entropy(
        logits.flatten(0, -2).float(),
        labels.masked_fill(~kept, IGNORED).flatten(),
        ignore_index=IGNORED,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    return total / kept.sum().clamp(min=1)


def _classification(logits: Tensor, labels: Tensor) -> Tensor:
    n = logits.shape[-1]
    if labels.ndim != 1:
        raise ValueError(
            f"labels {tuple(labels.shape)} of {labels.dtype} are neither class indices (B,) nor values, floats of "
            f"shape (B, {n}); labels that are each there or not need multilabel"
        )
    if labels.is_floating_point():  # as a table with gaps has them
        labels = labels.masked_fill(labels.isnan(), IGNORED)
        if labels.device.type == "cpu" and bool((labels != labels.round()).any()):
            raise ValueError(f"labels (B,) of {n} outputs are class indices; one is {_first(labels, labels.round())}")
        labels = labels.long()
    _check_integers(labels, "class indices")
    _check_below(labels, n, "the head")
    return _cross_entropy(logits, labels)


def _first(labels: Tensor, expected: Tensor) -> float:
    return float(labels[labels != expected][0])


def _regression(logits: Tensor, labels: Tensor) -> Tensor:
    n = logits.shape[-1]
    if tuple(labels.shape) not in ((len(logits), n), *([(len(logits),)] if n == 1 else [])):
        raise ValueError(f"labels {tuple(labels.shape)} are values for logits {tuple(logits.shape)}, of the same shape")
    if labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels of one output are values; got {labels.dtype}; labels that are there or not need "
                         f"multilabel")  # fmt: skip
    values = labels.float().view_as(logits)
    kept = ~values.isnan()
    squares = (logits.float() - values.masked_fill(~kept, 0)).square()
    return (squares * kept).sum() / kept.sum().clamp(min=1)


def _multilabel(logits: Tensor, labels: Tensor) -> Tensor:
    if labels.shape != logits.shape:
        raise ValueError(f"labels {tuple(labels.shape)} of multilabel must have the shape of logits "
                         f"{tuple(logits.shape)}")  # fmt: skip
    values = labels.float()
    kept = values >= 0  # so is no NaN
    values = values.masked_fill(~kept, 0)
    if values.device.type == "cpu" and bool(((values != 0) & (values != 1)).any()):
        raise ValueError(f"labels of multilabel are 0 or 1, negative or NaN = missing; one is "
                         f"{_first(values, (values > 0).float())}")  # fmt: skip
    losses = F.binary_cross_entropy_with_logits(logits.float(), values, reduction="none")
    return (losses * kept).sum() / kept.sum().clamp(min=1)
