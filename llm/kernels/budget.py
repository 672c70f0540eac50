"""How many of a stream's tokens may pass: a bound that rises with its length, kept without looking ahead.

Token t of a document passes where it wants to and fewer than bound(t) = floor(max_rate (t + 1) + burst) have passed
before it. The number that have passed by t is W_t + min(0, min over s <= t of bound(s) - W_s), W_t being how many
wanted to: a running sum and a running minimum.

Shapes: B rows, T tokens.
"""

import torch
from torch import Tensor

APART = 1 << 40
"""More than any number of tokens: what separates documents in one running minimum."""


def passed(
    want_BT: Tensor, bounds_BT: Tensor, documents_BT: Tensor | None = None, before_B: Tensor | None = None
) -> Tensor:
    """bool, (B, T): which tokens pass. documents: int64 that rises where a document of the row begins; None = one a
    row. before: int64, (B,), how many have passed of each row's document before the first token."""
    wanted_BT = want_BT.long().cumsum(1)
    if documents_BT is None:
        started = torch.zeros_like(wanted_BT)
        apart_BT = started
    else:
        begins = torch.ones_like(want_BT)
        begins[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
        started = ((wanted_BT - want_BT.long()) * begins).cummax(1).values
        apart_BT = begins.long().cumsum(1) * APART
    wanted_BT = wanted_BT - started
    left_BT = bounds_BT - wanted_BT
    if before_B is not None:
        left_BT = left_BT - before_B[:, None]
    lowest_BT = (left_BT - apart_BT).cummin(1).values + apart_BT
    count_BT = wanted_BT + lowest_BT.clamp(max=0)
    # of a document's first token all that it counts is its own
    previous_BT = torch.cat([torch.zeros_like(count_BT[:, :1]), count_BT[:, :-1]], dim=1)
    if documents_BT is not None:
        previous_BT = previous_BT.masked_fill(begins, 0)
    return count_BT > previous_BT
