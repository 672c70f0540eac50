"""How likely tokens are, given final hidden states: only at the positions that are asked for, a block of them at a
time, so that no (tokens, vocabulary) tensor of a batch exists.

Shapes: n positions, D model width, V vocabulary.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llm.model import LLM

BLOCK_ROWS = 256
"""Of logits that exist at a time on a CPU: with fewer, a product with a large vocabulary takes up to 1.7 times as long
(measured), as each block reads the whole matrix."""
BLOCK_ELEMENTS = 1 << 28
"""Logits that exist at a time elsewhere."""
ALIGNED_ROWS = 16
"""Rows come in multiples of it: a CPU takes another product, with other bits, for a few rows."""
CACHED_ELEMENTS = 1 << 18
"""Logits that are turned into probabilities at a time on a CPU, so that they stay in its cache."""


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
    rows = block_rows(hidden_nD.device, model.args.vocab_size)
    parts = []
    for hidden, targets in zip(hidden_nD.split(rows), targets_n.split(rows), strict=True):
        logits = model.logits(F.pad(hidden, (0, 0, 0, -len(hidden) % ALIGNED_ROWS))[None])[0, : len(hidden)]
        some = max(1, CACHED_ELEMENTS // logits.shape[1]) if logits.device.type == "cpu" else rows
        parts += [_of_logits(*pair) for pair in zip(logits.split(some), targets.split(some), strict=True)]
    return TargetScores(*(torch.cat(of_all) for of_all in zip(*parts, strict=True)))


def block_rows(device: torch.device, vocab_size: int) -> int:
    """Rows of logits that exist at a time."""
    if device.type == "cpu":
        return BLOCK_ROWS
    return max(1, BLOCK_ELEMENTS // vocab_size // ALIGNED_ROWS) * ALIGNED_ROWS


def _of_logits(logits_nV: Tensor, targets_n: Tensor) -> TargetScores:
    """Overwrites the logits."""
    finite_n = logits_nV.sum(-1).isfinite()  # by far the fastest way to ask: aminmax takes thirty times as long
    high_n = logits_nV.amax(-1)
    at_target_n = logits_nV.gather(-1, targets_n[:, None]).squeeze(-1)
    greedy_n = at_target_n == high_n
    first = greedy_n.nonzero().flatten()  # of equal ones the first is taken
    greedy_n[first] = logits_nV[first].argmax(-1) == targets_n[first]
    # each term's float32 is exact to 1e-7 of itself, so their sum, in float64, is, however near to 1 it is
    total_n = logits_nV.sub_(high_n[:, None]).exp_().sum(-1, dtype=torch.float64)
    return TargetScores((at_target_n - high_n).double() - total_n.log(), greedy_n, finite_n)
