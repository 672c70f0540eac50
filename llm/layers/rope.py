"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and its stretchings to longer contexts.

A head of width d is read as d/2 complex numbers, each turned by position times its frequency. Two layouts exist in
released weights: interleaved, where elements (2m, 2m+1) are one number (Meta), and halves, where elements (m, m + d/2)
are (Hugging Face Llama). Feeding one layout to the other gives fluent nonsense, so the layout is an argument of the
model.

Shapes: B batch, T tokens, H heads, d head width, m rotated pairs.
"""

import math

import torch
from torch import Tensor

from llm.args import RopeScaling
from llm.kernels.rotate import Turns


def inverse_frequencies(width: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """theta^(-2m/width) for m = 0 .. width/2 - 1, float32 on the CPU, stretched as `scaling` says.

    "dynamic" depends on the text: see `dynamic_frequencies`.
    """
    frequency = theta ** -(torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width)
    if scaling is None or scaling.kind == "dynamic":
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    kept = _kept_by_yarn(width, theta, scaling) if scaling.kind == "yarn" else _kept_by_llama3(frequency, scaling)
    return frequency * (kept + (1 - kept) / scaling.factor)


def _kept_by_llama3(frequency: Tensor, scaling: RopeScaling) -> Tensor:
    """Share of each frequency that is kept: 0 for slow ones, 1 for fast ones, a ramp between (empty when low == high).
    """
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position * frequency / (2 * math.pi)  # whole turns within the original context
    return ((turns - low) / (high - low)).clamp(0, 1) if high > low else (turns >= low).float()


def _kept_by_yarn(width: int, theta: float, scaling: RopeScaling) -> Tensor:
    """The same for YaRN (Peng et al. 2023, arXiv:2309.00071), whose ramp runs over dimensions."""

    def dimension(turns: float) -> float:
        """Where a frequency turns so often within the original context."""
        return width * math.log(scaling.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    ramp = (torch.arange(width // 2, dtype=torch.float32, device="cpu") - first) / max(last - first, 1e-3)
    return 1 - ramp.clamp(0, 1)


def dynamic_frequencies(length_BT: Tensor, width: int, theta: float, scaling: RopeScaling) -> Tensor:
    """Frequencies of each token, (B, T, 1, width/2) float32, whose document has so many positions: beyond the original
    context the base grows (bloc97 2023, "Dynamically scaled RoPE"). What earlier tokens of a document were rotated by
    while it was shorter differs: with a cache, that is so for its keys.
    """
    original = scaling.original_max_position
    length = length_BT.to(torch.float64).clamp(min=original)
    base = theta * (scaling.factor * length / original - (scaling.factor - 1)) ** (width / (width - 2))
    power = torch.arange(0, width, 2, dtype=torch.float64, device=length_BT.device) / width
    return (base[..., None, None] ** -power).float()


def amplitude(scaling: RopeScaling | None) -> float:
    """Factor on rotated vectors: YaRN sharpens attention with it."""
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    return scaling.attention_factor or 0.1 * math.log(max(scaling.factor, 1.0)) + 1


def rotation(positions_BT: Tensor, frequency: Tensor, amplitude: float = 1.0) -> Tensor:
    """Complex numbers amplitude * exp(i * position * frequency), complex64 (B, T, 1, m); frequency: (m,), or
    (B, T, 1, m) where tokens differ.

    Made on demand from positions: a table would have to guess the longest text, and a buffer would be cast to bf16 with
    the model.
    """
    angle_BT1m = _angles(positions_BT, frequency)
    return torch.polar(torch.full_like(angle_BT1m, amplitude), angle_BT1m)


def turns(positions_BT: Tensor, frequency: Tensor, amplitude: float = 1.0) -> Turns:
    """`rotation` as two float32 tensors."""
    angle_BT1m = _angles(positions_BT, frequency)
    return Turns(angle_BT1m.cos() * amplitude, angle_BT1m.sin() * amplitude)


def _angles(positions_BT: Tensor, frequency: Tensor) -> Tensor:
    return positions_BT[..., None, None].float() * frequency.to(positions_BT.device)
