"""Initial weights as a pure function of (seed, canonical name, element index), the same bits on every CPU and layout.

Each element owns one 64-bit word of a Philox4x64 stream (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2,
3") keyed by seed and name, so a rank can draw any range alone. The word becomes a normal through the inverse
distribution function (Wichura 1988, algorithm AS 241, routine PPND7, relative error about 1e-7). Only + - * /, sqrt and
frexp are used: IEEE fixes their results, while exp and log differ between math libraries.
"""

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import factorial
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llm.boxes import Box, runs
from llm.environment import ranks_here

WORDS_PER_BLOCK = 4  # one step of Philox4x64 gives four words
BLOCK = 1 << 18  # elements drawn at a time, so that the float64 temporaries stay in cache
SHORT_RUN = 1 << 10  # shorter runs of a box cost less when what lies between them is drawn too
LN2 = 0.6931471805599453
TERMS = 20
"""Of series whose terms fall as those of the exponential of numbers up to 1."""
ONE_OVER_ROOT2 = 0.7071067811865476

# AS 241, PPND7: numerators and denominators of its three rational approximations, lowest power first
CENTRE = ((3.3871327179, 50.434271938, 159.29113202, 59.109374720), (1.0, 17.895169469, 78.757757664, 67.187563600))
NEAR_TAIL = ((1.4234372777, 2.7568153900, 1.3067284816, 0.17023821103), (1.0, 0.73700164250, 0.12021132975))
FAR_TAIL = ((6.6579051150, 3.0812263860, 0.42868294337, 0.017337203997), (1.0, 0.24197894225, 0.012258202635))


class Draw(Protocol):
    """How initial values come about."""

    def values(self, seed: int, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened (row-major, uncut) parameter `name`, 1-D float32: a function of these
        four alone, the same bits on every machine."""


@dataclass(frozen=True)
class Normal:
    """Normal values of mean 0."""

    std: float

    def values(self, seed: int, name: str, start: int, stop: int) -> Tensor:
        return torch.from_numpy(normal(seed, name, start, stop, self.std))


@dataclass(frozen=True)
class Uniform:
    """Values spread evenly over (-bound, bound)."""

    bound: float

    def values(self, seed: int, name: str, start: int, stop: int) -> Tensor:
        return torch.from_numpy(((2 * uniform(seed, name, start, stop) - 1) * self.bound).astype(np.float32))


@dataclass(frozen=True)
class LogUniform:
    """Logarithms of values spread evenly over (low, high), both above 0."""

    low: float
    high: float

    def values(self, seed: int, name: str, start: int, stop: int) -> Tensor:
        spread = self.low + (self.high - self.low) * uniform(seed, name, start, stop)
        return torch.from_numpy(_log(spread).astype(np.float32))


@dataclass(frozen=True)
class InverseSoftplus:
    """ln(exp(y) - 1) of values y whose logarithms are spread evenly between those of low and high, 0 < low < high <= 1.
    """

    low: float
    high: float

    def values(self, seed: int, name: str, start: int, stop: int) -> Tensor:
        first, last = _log(np.array([self.low, self.high]))
        y = _exp(first + (last - first) * uniform(seed, name, start, stop))
        # ln(exp(y) - 1) = y + ln(1 - exp(-y)), whose series in y loses no digits where y is small
        terms = tuple((-1.0) ** k / factorial(k + 1) for k in range(TERMS))
        return torch.from_numpy((y + _log(y * _polynomial(terms, y))).astype(np.float32))


@dataclass(frozen=True)
class Constant:
    """The same value everywhere: norms begin as the identity, biases at 0."""

    value: float

    def values(self, seed: int, name: str, start: int, stop: int) -> Tensor:
        return torch.full((stop - start,), self.value)


def initialise(model: nn.Module, draws: Mapping[str, Draw], seed: int) -> None:
    """Fill every parameter of `model` in place; parameters on the meta device are left as they are."""
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            values = draws[name].values(seed, name, 0, parameter.numel())
            with torch.no_grad():
                parameter.copy_(values.view(parameter.shape))


def values_in_box(
    draw: Draw, name: str, seed: int, shape: tuple[int, ...], box: Box, start: int, stop: int
) -> Tensor:
    """Elements [start, stop) of the flattened `box` of parameter `name`, of whole `shape`. 1-D float32.

    The parts of a box that are contiguous in the parameter are drawn alone, or where they are short, together with what
    lies between them, a block at a time.
    """
    values = torch.empty(stop - start)
    pending: list[tuple[int, int, int]] = []

    def draw_pending() -> None:
        low, high = pending[0][0], pending[-1][0] + pending[-1][2]
        drawn = draw.values(seed, name, low, high)
        for first, at, length in pending:
            values[at - start : at - start + length] = drawn[first - low : first - low + length]
        pending.clear()

    for first, at, length in runs(shape, box, start, stop):
        if pending and (length >= SHORT_RUN or first + length - pending[0][0] > BLOCK):
            draw_pending()
        pending.append((first, at, length))
    if pending:
        draw_pending()
    return values


def normal(seed: int, name: str, start: int, stop: int, std: float = 1.0) -> NDArray[np.float32]:
    """Normal values number start to stop - 1 of the stream (seed, name), float32; by as many threads as this process
    has cores, since a block is the same bits whoever draws it."""
    out = np.empty(stop - start, dtype=np.float32)

    def draw(low: int) -> None:
        high = min(low + BLOCK, stop)
        out[low - start : high - start] = inverse_normal(uniform(seed, name, low, high)) * std

    blocks, threads = range(start, stop, BLOCK), _own_cores()
    if len(blocks) > 1 and threads > 1:
        with ThreadPoolExecutor(threads) as pool:  # numpy lets go of the interpreter while it computes
            list(pool.map(draw, blocks))
    else:
        for low in blocks:
            draw(low)
    return out


def _own_cores() -> int:
    """This process's share of the cores that it may use, beside the other ranks of a launcher on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // ranks_here())


def uniform(seed: int, name: str, start: int, stop: int) -> NDArray[np.float64]:
    """Uniform values number start to stop - 1 of the stream (seed, name), float64, strictly inside (0, 1)."""
    key = int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=16).digest(), "little")
    first_block, skip = divmod(start, WORDS_PER_BLOCK)
    words = np.random.Philox(key=key, counter=first_block).random_raw(skip + stop - start)[skip:]
    # 52 bits and a half: exact in float64, symmetric about 1/2, never 0 or 1
    return ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def inverse_normal(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """Standard normal quantile of each 0 < p < 1, float64."""
    q = p - 0.5
    z = q * _rational(CENTRE, 0.180625 - q * q)
    tail = np.abs(q) > 0.425
    q_tail = q[tail]
    r = np.sqrt(-_log(np.where(q_tail < 0, p[tail], 1 - p[tail])))
    size = np.where(r <= 5, _rational(NEAR_TAIL, r - 1.6), _rational(FAR_TAIL, r - 5))
    z[tail] = np.where(q_tail < 0, -size, size)
    return z


def _rational(ratio: tuple[tuple[float, ...], tuple[float, ...]], x: NDArray[np.float64]) -> NDArray[np.float64]:
    numerator, denominator = (_polynomial(coefficients, x) for coefficients in ratio)
    return numerator / denominator


def _polynomial(coefficients: tuple[float, ...], x: NDArray[np.float64]) -> NDArray[np.float64]:
    value = np.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value *= x
        value += coefficient
    return value


def _exp(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """The exponential to about 1e-15: a series of what is left when multiples of ln 2 are taken away."""
    exponent = np.rint(x / LN2)
    terms = tuple(1 / factorial(k) for k in range(TERMS))
    return np.ldexp(_polynomial(terms, x - exponent * LN2), exponent.astype(np.int64))


def _log(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Natural logarithm to about 1e-12: exponent times ln 2, plus 2 artanh of the mantissa's (m - 1) / (m + 1) as a
    series."""
    mantissa, exponent = np.frexp(x)
    small = mantissa < ONE_OVER_ROOT2
    mantissa = np.where(small, mantissa * 2, mantissa)
    exponent = exponent - small
    s = (mantissa - 1) / (mantissa + 1)
    return exponent * LN2 + 2 * s * _polynomial(tuple(1 / k for k in range(1, 16, 2)), s * s)
