"""Experts that take a limited number of assignments: which are admitted, and what becomes of the others.

Assignments are admitted in the order of positions, so that whether a token's is admitted never depends on a later one
(Fedus et al. 2021, arXiv:2101.03961, count in this order over a whole batch). With scope "row" every row of a batch is
counted by itself: the same assignments are admitted however rows are dealt to ranks and micro-batches.

Shapes: B batch, T tokens of a row, N = B*T, E experts, k experts a token, P = N*k (token, choice) pairs.
"""

import torch
from torch import Tensor

from llm.args import MoEArgs


def rejected(expert_Nk: Tensor, valid_N: Tensor | None, shape: tuple[int, int], moe: MoEArgs) -> Tensor:
    """Which assignments find their expert full, (N, k) bool: of each row those beyond its first `moe.capacity` to an
    expert by (t, slot); with scope "call" of all rows together those beyond the first by (t, row, slot).

    shape: B and T. Padding is never rejected, and takes no place.
    """
    assert moe.capacity is not None
    n_rows, k = shape[0], expert_Nk.shape[1]
    expert_BTk = expert_Nk.view(*shape, k)
    valid_BT = torch.ones(shape, dtype=torch.bool, device=expert_Nk.device)
    if valid_N is not None:
        valid_BT = valid_N.view(shape)
    if moe.capacity_scope == "call":  # one row of all tokens, position by position
        expert_BTk, valid_BT, n_rows = expert_BTk.transpose(0, 1), valid_BT.transpose(0, 1), 1
    expert_P = expert_BTk.flatten()
    row_P = torch.arange(n_rows, device=expert_P.device).repeat_interleave(expert_P.numel() // n_rows)
    beyond = n_rows * moe.n_experts
    queue_P = torch.where(valid_BT.flatten().repeat_interleave(k), row_P * moe.n_experts + expert_P, beyond)
    place_P = _place_in_queue(queue_P, beyond + 1)
    full_BTk = ((place_P >= moe.capacity) & (queue_P < beyond)).view(expert_BTk.shape)
    return (full_BTk.transpose(0, 1) if moe.capacity_scope == "call" else full_BTk).reshape(expert_Nk.shape)


def _place_in_queue(queue_P: Tensor, n_queues: int) -> Tensor:
    """How many before each stand in the same queue."""
    order_P = torch.argsort(queue_P, stable=True)
    lengths = torch.bincount(queue_P, minlength=n_queues)
    first = lengths.cumsum(0) - lengths
    index_P = torch.arange(len(queue_P), device=queue_P.device)
    return torch.empty_like(queue_P).scatter_(0, order_P, index_P - first[queue_P[order_P]])
