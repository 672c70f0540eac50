"""Hyformer's attention_mask as positions, negative for padding, which no token sees.

Shapes: B rows, T tokens of a row, P tokens that a cache has of it.
"""

import torch
from torch import Tensor

from llm.datatypes import Ints


def valid_of(attention_mask: Tensor | None, tokens: Tensor, cached: int = 0) -> Tensor | None:
    """(B, T) bool on the CPU: which tokens are no padding; None where all are.

    attention_mask: 1 = token, 0 = padding, of any dtype; with `cached` tokens before them (B, P + T) too, whose first P
    are of those. ValueError where it is something else.
    """
    if attention_mask is None:
        return None
    n_rows, row_length = tokens.shape
    shapes = {(n_rows, row_length), (n_rows, cached + row_length)}
    if tuple(attention_mask.shape) not in shapes:
        raise ValueError(
            f"attention_mask {tuple(attention_mask.shape)} must have the shape of input_ids, {(n_rows, row_length)}"
        )
    mask = attention_mask[:, -row_length:].detach().cpu()
    valid = mask != 0
    if not torch.equal(mask.double(), valid.double()):
        raise ValueError("attention_mask is 1 for tokens and 0 for padding; it holds other numbers")
    return None if bool(valid.all()) else valid


def positions_of(valid_BT: Tensor, first_B: Ints) -> Tensor:
    """(B, T) int64: tokens counted on from the first positions, padding left out."""
    counted = torch.from_numpy(first_B)[:, None] + valid_BT.cumsum(dim=1) - 1
    return counted.masked_fill(~valid_BT, -1)


def check_rows(valid_BT: Tensor | None) -> None:
    """ValueError where a row is padding alone, of which nothing can be predicted."""
    if valid_BT is not None and not bool(valid_BT.any(dim=1).all()):
        row = int((~valid_BT.any(dim=1)).nonzero()[0]) + 1
        raise ValueError(f"attention_mask: row {row} is padding alone, so nothing can be predicted of it")


def without_padding(labels_BT: Tensor, valid_BT: Tensor | None, shifted: bool) -> Tensor:
    """Labels (B, T) of token ids with those at padding taken out; shifted: with those, too, that padding would have to
    predict, the position before them."""
    if valid_BT is None:
        return labels_BT
    counts = valid_BT.clone()
    if shifted:
        counts[:, 1:] &= valid_BT[:, :-1]
    return labels_BT.masked_fill(~counts.to(labels_BT.device), -100)
