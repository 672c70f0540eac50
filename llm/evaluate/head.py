"""How likely tokens are, given final hidden states: only at the positions that are asked for, a block of them at a
time, so that no (tokens, vocabulary) tensor of a batch exists.

Shapes: n positions, D model width, V vocabulary.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llm.model import LLM

BLOCK_ELEMENTS = {"cpu": 1 << 20, "accelerator": 1 << 25}
"""Logits that exist at a time."""
BLOCK_ROWS = 16
"""Rows come in multiples of it: a CPU takes another product, with other bits, for a few rows."""


class TargetScores(NamedTuple):
    """Of each target, (n,)."""

    logprob: Tensor
    """float64, nats"""
    greedy: Tensor
    """bool: whether no token is likelier, or of a lower id and as likely"""
    finite: Tensor
    """bool: whether all logits of its row are finite"""


@torch.no_grad()
def target_scores(model: LLM, hidden_nD: Tensor, targets_n: Tensor) -> TargetScores:
    """Of each target, given the hidden state before it. A row's bits depend on that row alone."""
    elements = BLOCK_ELEMENTS["cpu" if hidden_nD.device.type == "cpu" else "accelerator"]
    rows = max(1, elements // model.args.vocab_size // BLOCK_ROWS) * BLOCK_ROWS
    parts = [
        _of_block(model, hidden, targets)
        for hidden, targets in zip(hidden_nD.split(rows), targets_n.split(rows), strict=True)
    ]
    return TargetScores(*(torch.cat(of_all) for of_all in zip(*parts, strict=True)))


def _of_block(model: LLM, hidden_nD: Tensor, targets_n: Tensor) -> TargetScores:
    n = len(hidden_nD)
    logits_nV = model.logits(F.pad(hidden_nD, (0, 0, 0, -n % BLOCK_ROWS))[None])[0, :n]
    low_n, high_n = logits_nV.aminmax(dim=-1)
    target_n1 = targets_n[:, None]
    at_target_n = logits_nV.gather(-1, target_n1).squeeze(-1)
    greedy_n = at_target_n == high_n
    first = greedy_n.nonzero().flatten()  # of equal ones the first is taken
    greedy_n[first] = logits_nV[first].argmax(-1) == targets_n[first]
    # each term's float32 is exact to 1e-7 of itself, so their sum, in float64, is, however near to 1 it is
    total_n = logits_nV.sub_(high_n[:, None]).exp_().sum(-1, dtype=torch.float64)
    logprob_n = (at_target_n - high_n).double() - total_n.log()
    return TargetScores(logprob_n, greedy_n, low_n.isfinite() & high_n.isfinite())
