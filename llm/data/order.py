"""The order of rows: a keyed permutation of 0..n-1 that is computed index by index, so nothing is stored and any place
is reached at once.

A Feistel network on the smallest even number of bits that holds n, with cycle walking for the values that fall outside
(Black & Rogaway 2002, "Ciphers with arbitrary finite domains"). Every training run depends on these bits: tests hold
golden vectors, and any change must raise ORDER_VERSION.
"""

import hashlib

import numpy as np

ORDER_VERSION = 1
ROUNDS = 6
MAX_ROWS = 1 << 62


def round_keys(*parts: int | str) -> np.ndarray:
    """Keys (ROUNDS,) uint64 of the permutation named by `parts`, for example (seed, source name, epoch)."""
    name = "\0".join(f"{type(part).__name__}:{part}" for part in parts)
    return np.frombuffer(hashlib.blake2b(name.encode(), digest_size=8 * ROUNDS).digest(), dtype="<u8").astype(np.uint64)


def permute(index: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Images (int64) of `index` under the permutation of 0..n-1 that `keys` names.

    Args:
        index: (k,) integers, all in 0..n-1. ValueError otherwise: a value outside might walk forever.
        keys: (ROUNDS,) for one permutation, or (ROUNDS, k) for one permutation per index.
    """
    index = np.asarray(index)
    if not 0 < n <= MAX_ROWS:
        raise ValueError(f"a permutation of {n} rows: expected 1 to {MAX_ROWS}")
    if index.size and not 0 <= int(index.min()) <= int(index.max()) < n:
        raise ValueError(f"rows {int(index.min())}..{int(index.max())} are not all within 0..{n - 1}")
    half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
    value = _feistel(index.astype(np.uint64), keys, half_bits)
    outside = np.flatnonzero(value >= n)
    while outside.size:
        value[outside] = _feistel(value[outside], keys if keys.ndim == 1 else keys[:, outside], half_bits)
        outside = outside[value[outside] >= n]
    return value.astype(np.int64)


def _feistel(value: np.ndarray, keys: np.ndarray, half_bits: int) -> np.ndarray:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = value >> shift, value & mask
    for key in keys:
        left, right = right, left ^ (_scramble(right ^ key) & mask)
    return (left << shift) | right


def _scramble(value: np.ndarray) -> np.ndarray:
    """Multiply and xorshift until each output bit depends on each input bit (the finaliser of splitmix64; arithmetic
    modulo 2**64).
    """
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
