"""One vector of each document, made of the final hidden states of its tokens.

Shapes: B rows, T tokens of a row, N = B * T, D model width, S documents, M most documents of a row.
"""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from llm.datatypes import Ints

Pool = Literal["mean", "first", "last"]


def pooled(hidden_BTD: Tensor, positions_BT: Ints, starts_S: Ints, pool: Pool) -> Tensor:
    """The mean over a document's tokens, or its first or last one's vector, (S, D) float32; 0 of a document that is
    padding alone.

    positions_BT: negative ones mark padding, which has no part in it. starts_S: where documents begin among the
    flattened tokens, every start of a row among them (`TransformerInput.resolve`).

    Deterministic on a GPU too, backward included: the mean is a product of matrices, and no index occurs twice.
    What is not finite stays in its document: of the mean, that document's vector is NaN.
    """
    n_rows, row_length = positions_BT.shape
    valid_N = positions_BT.reshape(-1) >= 0
    document_N = np.repeat(np.arange(len(starts_S)), np.diff(np.append(starts_S, valid_N.size)))
    counts_S = np.bincount(document_N[valid_N], minlength=len(starts_S))
    if pool == "mean":
        found = _sums(hidden_BTD, document_N, valid_N, starts_S) / _on(hidden_BTD, counts_S.clip(min=1))[:, None]
    else:
        at_S = starts_S.copy()
        places = np.flatnonzero(valid_N)
        places = places[::-1] if pool == "first" else places  # of several assignments the last one stays
        at_S[document_N[places]] = places
        found = hidden_BTD.flatten(0, 1).index_select(0, _on(hidden_BTD, at_S)).float()
    if counts_S.all():
        return found
    return found.masked_fill(_on(hidden_BTD, counts_S == 0)[:, None], 0)


def _sums(hidden_BTD: Tensor, document_N: Ints, valid_N: np.ndarray, starts_S: Ints) -> Tensor:
    """Of each document, (S, D) float32; NaN of one with a number that is not finite."""
    n_rows, row_length, dim = hidden_BTD.shape
    row_S = starts_S // row_length
    slot_S = np.arange(len(starts_S)) - np.searchsorted(row_S, row_S)  # number of the document in its row
    most = int(slot_S.max()) + 1
    slot_BT = np.where(valid_N, slot_S[document_N], -1).reshape(n_rows, row_length)
    slots_M1 = torch.arange(most, device=hidden_BTD.device)[:, None]
    member_BMT = (_on(hidden_BTD, slot_BT)[:, None] == slots_M1).float()
    broken_BT1 = ~hidden_BTD.isfinite().all(-1, keepdim=True)  # 0 times such a number is NaN in all others' sums
    sums_BMD = member_BMT @ hidden_BTD.float().masked_fill(broken_BT1, 0)
    sums_BMD = sums_BMD.masked_fill(member_BMT @ broken_BT1.float() > 0, torch.nan)
    return sums_BMD.view(-1, dim).index_select(0, _on(hidden_BTD, row_S * most + slot_S))


def _on(like: Tensor, array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(like.device)
