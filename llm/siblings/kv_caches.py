"""Hyformer's list of caches, one a block, over the one cache that a generation has."""

from collections.abc import Sequence
from dataclasses import dataclass

from llm.args import ModelArgs
from llm.cache import Cache


@dataclass(frozen=True)
class KVCache:
    """What a block remembers of the rows that are continued: a place in the cache that all blocks share."""

    shared: Cache
    layer: int
    length: int
    """Tokens remembered of each row, padding included."""


def listed(cache: Cache, n_layers: int) -> list[KVCache]:
    """One for each block."""
    return [KVCache(cache, layer, cache.length) for layer in range(n_layers)]


def shared(caches: Sequence[KVCache | None] | None, args: ModelArgs) -> Cache:
    """The cache that a list means, a new one where it is None or a list of None. ValueError where it is not the list
    that the last call gave."""
    if caches is None:
        return Cache(args)
    if len(caches) != args.n_layers:
        raise ValueError(f"kv_caches has {len(caches)} entries; the model has {args.n_layers} blocks")
    held = [cache for cache in caches if cache is not None]
    if not held:
        return Cache(args)
    if not all(isinstance(cache, KVCache) for cache in held):
        raise ValueError("kv_caches are the list in extras['kv_caches'] of the call before, or None for each block")
    in_order = [cache.layer for cache in held] == list(range(args.n_layers))
    if not in_order or any(cache.shared is not held[0].shared for cache in held):
        raise ValueError("kv_caches are of several lists, or in another order; give the list as one call gave it")
    if held[0].length != held[0].shared.length:
        raise ValueError(
            f"kv_caches have been continued since: they were of {held[0].length} tokens and are of "
            f"{held[0].shared.length}; give extras['kv_caches'] of the last call"
        )
    return held[0].shared
