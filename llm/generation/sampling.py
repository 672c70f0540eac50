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
    """One token a row: where the row's uniform number falls in the cumulative probability, most likely token first."""
    # the largest becomes 0 before the division, which so cannot overflow
    below_BV = logits_BV.double() - logits_BV.amax(-1, keepdim=True)
    scaled_BV, order_BV = (below_BV / temperature).sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        scaled_BV = scaled_BV[:, :top_k]
    p_BV = scaled_BV.softmax(-1)
    if top_p is not None:
        before_BV = p_BV.cumsum(-1) - p_BV
        p_BV = p_BV.masked_fill(before_BV > top_p, 0)
    cumulative_BV = p_BV.cumsum(-1)
    target_B1 = torch.from_numpy(uniform_B).to(p_BV.device)[:, None] * cumulative_BV[:, -1:]
    rank_B1 = (cumulative_BV <= target_B1).sum(-1, keepdim=True)
    return order_BV.gather(-1, rank_B1).squeeze(-1).cpu().numpy()


def penalised(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """The logits with those of seen tokens made less likely, as `transformers` does."""
    return torch.where(seen_BV, torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty), logits_BV)
