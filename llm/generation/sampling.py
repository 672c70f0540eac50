"""Which token comes next: the most likely one, or a draw.

Shapes: B rows, V vocabulary.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LARGEST_SEED = 2**63 - 1
BUCKETS_PER_UNIT, BUCKETS = 8, 256
"""Of logits over the temperature, below the largest: what is less likely by 32 is in the last one."""


class NonFiniteLogits(FloatingPointError):
    """A model's logits hold NaN or infinity, so that no choice among them means anything."""

    def __init__(self, row: int, step: int, count: int, of: int) -> None:
        """row: of the prompts, from 0; step: of the generation, from 1; `count` of `of` logits are not finite."""
        super().__init__(f"prompt row {row}, new token {step}: {count} of {of} logits are not finite")
        self.row, self.step, self.count, self.of = row, step, count, of


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. ValueError, beginning with the setting's name, where one is out of range."""

    temperature: float = 0.0
    """0 takes the most likely token; else logits are divided by it"""
    top_k: int | None = None
    """of these only so many likeliest remain"""
    top_p: float | None = None
    """of these only the likeliest up to this probability, always one"""
    repetition_penalty: float = 1.0
    """logits of tokens that stand in the prompt or were generated are divided by it where positive, multiplied where
    negative, before all else (Keskar et al. 2019, arXiv:1909.05858); 1 = none"""
    seed: int = 0
    """of the draws"""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature={self.temperature} must be 0 (greedy) or positive and finite")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1, or left out")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1], or be left out")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be positive and finite; 1 = none")
        if not 0 <= self.seed <= LARGEST_SEED:
            raise ValueError(f"seed={self.seed} must lie between 0 and {LARGEST_SEED}")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise ValueError("top_k and top_p need a temperature above 0; at 0 the most likely token is taken")


def sample(
    logits_BV: Tensor, uniform_B: NDArray[np.float64], temperature: float, top_k: int | None, top_p: float | None
) -> NDArray[np.int64]:
    """One token a row: where the row's uniform number falls in the cumulative probability, most likely token first, of
    equally likely ones the lower id."""
    # the largest becomes 0 before the division, which so cannot overflow
    scaled_BV = (logits_BV.double() - logits_BV.amax(-1, keepdim=True)) / temperature
    if top_k is None and top_p is None and scaled_BV.device.type == "cpu":
        return _by_buckets(scaled_BV, uniform_B)
    if top_k is not None:
        values_BK = scaled_BV.topk(min(top_k, scaled_BV.shape[1])).values
    else:
        values_BK = scaled_BV.sort(dim=-1, descending=True).values
    p_BK = values_BK.softmax(-1)
    if top_p is not None:
        before_BK = p_BK.cumsum(-1) - p_BK
        p_BK = p_BK.masked_fill(before_BK > top_p, 0)
    cumulative_BK = p_BK.cumsum(-1)
    target_B1 = torch.from_numpy(uniform_B).to(p_BK.device)[:, None] * cumulative_BK[:, -1:]
    rank_B1 = (cumulative_BK <= target_B1).sum(-1, keepdim=True)
    value_B1 = values_BK.gather(-1, rank_B1)
    of_equals_B1 = rank_B1 - (values_BK > value_B1).sum(-1, keepdim=True)
    equal_BV = scaled_BV == value_B1
    return (equal_BV & (equal_BV.cumsum(-1) == of_equals_B1 + 1)).int().argmax(-1).cpu().numpy()


def _by_buckets(scaled_BV: Tensor, uniform_B: NDArray[np.float64]) -> NDArray[np.int64]:
    """`sample` of all tokens, in a fifth of the time that sorting them takes: they are counted into buckets of falling
    probability, and only the bucket that the uniform number falls into is put in order."""
    p_BV = scaled_BV.exp().numpy()
    bucket_BV = (scaled_BV * -BUCKETS_PER_UNIT).clamp_(max=BUCKETS - 1).int().numpy()
    n_rows = len(p_BV)
    numbers = bucket_BV + np.arange(0, n_rows * BUCKETS, BUCKETS, dtype=np.int32)[:, None]
    weights = np.bincount(numbers.ravel(), p_BV.ravel(), n_rows * BUCKETS).reshape(n_rows, BUCKETS)
    ends = weights.cumsum(-1)
    target_B = uniform_B * ends[:, -1]
    found = np.empty(n_rows, dtype=np.int64)
    for row, bucket in enumerate((ends <= target_B[:, None]).sum(-1).tolist()):
        ids = np.flatnonzero(bucket_BV[row] == bucket)
        ids = ids[np.argsort(-scaled_BV[row].numpy()[ids], kind="stable")]
        before = ends[row, bucket - 1] if bucket else 0.0
        rank = int((before + p_BV[row, ids].cumsum() <= target_B[row]).sum())
        found[row] = ids[min(rank, len(ids) - 1)]  # sums in another order end elsewhere in their last bits
    return found


def penalised(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """The logits with those of seen tokens made less likely, as `transformers` does."""
    return torch.where(seen_BV, torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty), logits_BV)
