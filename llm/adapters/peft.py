"""Low-rank adapters as PEFT keeps them: beside the weights of a Hugging Face model as transformers has them in memory.

What is added to a weight is s L R, with L (..., X, r) and R (..., r, Y) in the form of the weight (..., X, Y). A weight
of theirs may hold several of ours, one beside the other (a fused query_key_value, the stacked gate_up_proj of
experts). Adapters of k such parts, each of rank r, go out as one of rank k r, in which every part has its own r: of L
and R the one that is cut is block-diagonal, and so the product is the same. It comes in again as k adapters. One of
rank r that does not keep its parts apart comes in as k adapters with the factor that they share in each.

Matrices: lora_B is L, lora_A is R. A token table looks up rows of L: lora_embedding_A is L^T, lora_embedding_B is R^T.
Stacks are parameters and not modules (`target_parameters`): PEFT multiplies them over Y whatever they are for, and so
lora_A is R as (E r, Y), expert after expert, and lora_B is L as (X, r E), where experts change fastest; older versions
take X and Y the other way round. They wrap one parameter of a module after the other, the first one innermost.

Shapes: E experts, X and Y of a weight in the form of others, r rank of one of our adapters.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from llm.args import ModelArgs
from llm.boxes import Box
from llm.errors import UserError
from llm.foreign.family import Family, spellings
from llm.foreign.transforms import BoxPair, Shape, foreign_shapes
from llm.layers.lora import AdapterNames

PREFIX = "base_model.model."
"""What PEFT puts before the names of the model that it wraps."""
TOKEN_ROWS = "token_adapter.trainable_tokens_delta"
"""What PEFT calls rows of a table that train whole (`trainable_token_indices`): the rows themselves, whatever the name
says."""
Factors = tuple[Tensor, Tensor]
"""L (E, X, r) and R (E, r, Y); E is 1 of a matrix."""


class Site(NamedTuple):
    """A weight of the Hugging Face model, and where in it ours are."""

    key: str
    pairs: tuple[BoxPair, ...]

    @property
    def names(self) -> list[str]:
        """Of our weights that it holds."""
        return list(dict.fromkeys(pair.name for pair in self.pairs))

    @property
    def stacked(self) -> bool:
        return len(self.pairs[0].theirs) == 3

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, X, Y)."""
        *lead, x, y = foreign_shapes(self.pairs)[0, self.key]
        return lead[0] if lead else 1, x, y

    @property
    def module(self) -> str:
        """What PEFT wraps, as it calls it: of a stack the parameter."""
        return self.key if self.stacked else self.key.removesuffix(".weight")

    @property
    def tensors(self) -> tuple[str, str]:
        """What lora_A and lora_B are called in a file."""
        if self.stacked:
            inner = "base_layer." if any(name.endswith(".w1") for name in self.names) else ""
            stem = f"{PREFIX}{self.key.rpartition('.')[0]}.{inner}"
            return f"{stem}lora_A.weight", f"{stem}lora_B.weight"
        if self.is_table:
            return f"{PREFIX}{self.module}.lora_embedding_A", f"{PREFIX}{self.module}.lora_embedding_B"
        return f"{PREFIX}{self.module}.lora_A.weight", f"{PREFIX}{self.module}.lora_B.weight"

    @property
    def is_table(self) -> bool:
        """Whether it is a token table, and not an output matrix that is tied to one."""
        return self.pairs[0].name == "tok_embeddings.weight" and not self.pairs[0].twin


def sites_of(family: Family, args: ModelArgs) -> Iterator[tuple[Site, ...]]:
    """What each row of the family's table means for adapters: experts that lie apart have a site each."""
    for pairs in spellings(family, args.merged):
        yield tuple(Site(key, tuple(p for p in pairs if p.key == key)) for key in dict.fromkeys(p.key for p in pairs))


def sites_in_memory(family: Family, args: ModelArgs, adapters: Mapping[str, AdapterNames]) -> list[Site]:
    """The weights of a model in transformers that have the adapters beside ours."""
    chosen: dict[tuple[str, bool], tuple[Site, ...]] = {}
    for row in sites_of(family, args):
        for pair in (pair for site in row for pair in site.pairs):
            if pair.name in adapters:
                chosen[pair.name, pair.twin] = row
    return list(dict.fromkeys(site for row in chosen.values() for site in row))


def fused(site: Site, factors: Mapping[str, Factors], rank: int) -> Factors:
    """The one adapter of a site, of those of our weights in it that have any."""
    parts = [name for name in site.names if name in factors]
    n, x, y = site.shape
    first = factors[parts[0]][0]
    left, right = first.new_zeros(n, x, rank * len(parts)), first.new_zeros(n, rank * len(parts), y)
    for pair in (pair for pair in site.pairs if pair.name in factors):
        here = slice(parts.index(pair.name) * rank, (parts.index(pair.name) + 1) * rank)
        experts, rows, columns = _cut(pair.theirs)
        left[experts, rows, here], right[experts, here, columns] = _turned(pair, *_part(pair, *factors[pair.name]))
    return left, right


def parted(site: Site, adapter: Factors, rank: int, shapes: Mapping[str, Shape], into: dict[str, Factors]) -> None:
    """Put an adapter of a site into those of our weights, of which the site names some or all. shapes: of the weights.
    UserError where it is neither what `fused` makes of adapters of rank `rank` nor one of that rank.
    """
    found, k = adapter[0].shape[-1], len(site.names)
    if k == 1 and found == rank:
        _put(site, adapter, rank, site.names, shapes, into)
        return
    learned = all(factor.any() for factor in adapter)  # else nothing says whose one is that of a single rank
    apart = k > 1 and found % rank == 0 and (found > rank or learned)
    for names in combinations(site.names, found // rank) if apart else ():
        trial: dict[str, Factors] = {}
        _put(site, adapter, rank, names, shapes, trial)
        if all(torch.equal(a, b) for a, b in zip(adapter, fused(site, trial, rank), strict=True)):
            into.update(trial)
            return
    if found != rank:
        ranks = f"{rank}" if k == 1 else f"{rank}, or {k * rank} of {k} parts that have their own columns"
        raise UserError(f"the adapter of {site.key} has rank {found}, expected {ranks}")
    _put(site, adapter, rank, site.names, shapes, into, shared=True)


def _put(
    site: Site,
    adapter: Factors,
    rank: int,
    names: Sequence[str],
    shapes: Mapping[str, Shape],
    into: dict[str, Factors],
    shared: bool = False,
) -> None:
    """Copy what each of the named weights has of an adapter: its own columns of L, or those that all share."""
    left, right = adapter
    for pair in (pair for pair in site.pairs if pair.name in names):
        at = 0 if shared else names.index(pair.name) * rank
        here = slice(at, at + rank)
        experts, rows, columns = _cut(pair.theirs)
        values = _turned(pair, left[experts, rows, here], right[experts, here, columns])
        if pair.name not in into:
            n, x, y = (1, *shapes[pair.name])[-3:]
            into[pair.name] = left.new_zeros(n, x, rank), left.new_zeros(n, rank, y)
        for out, part in zip(_part(pair, *into[pair.name]), values, strict=True):
            out.copy_(part)


def _cut(box: Box) -> tuple[slice, slice, slice]:
    experts, rows, columns = ((0, 1), *box)[-3:]
    return slice(*experts), slice(*rows), slice(*columns)


def _part(pair: BoxPair, left: Tensor, right: Tensor) -> Factors:
    """What of the factors of one of our weights is in the pair."""
    experts, rows, columns = _cut(pair.mine)
    return left[experts, rows], right[experts, :, columns]


def _turned(pair: BoxPair, left: Tensor, right: Tensor) -> Factors:
    return (right.mT, left.mT) if pair.turned else (left, right)


def our_factors(name: str, adapters: Mapping[str, AdapterNames], tensors: Mapping[str, Tensor]) -> Factors:
    """L and R of one of our weights, as views of its adapter: B and A of a matrix, A and B of a stack."""
    a, b, _ = adapters[name]
    if tensors[a].dim() == 3:
        return tensors[a], tensors[b]
    return tensors[b][None], tensors[a][None]


def written(site: Site, adapter: Factors) -> dict[str, Tensor]:
    """The tensors that PEFT keeps of an adapter."""
    left, right = adapter
    name_a, name_b = site.tensors
    if site.is_table:
        return {name_a: left[0].mT, name_b: right[0].mT}
    n, x, rank = left.shape
    return {name_a: right.reshape(n * rank, -1), name_b: left.permute(1, 2, 0).reshape(x, rank * n)}


def read(site: Site, tensors: Callable[[str], Tensor]) -> Factors:
    """What `written` was given. UserError where the tensors are of another weight."""
    name_a, name_b = site.tensors
    a, b = tensors(name_a), tensors(name_b)
    if site.is_table:
        a, b = b.mT, a.mT  # so that they are those of a matrix
    n, x, y = site.shape
    if a.dim() == b.dim() == 2 and len(a) == b.shape[1] and len(a) % n == 0:
        per_expert, experts_last = a.reshape(n, -1, a.shape[1]), b.reshape(len(b), -1, n).permute(2, 0, 1)
        if (len(b), a.shape[1]) == (x, y):
            return experts_last, per_expert
        if site.stacked and (a.shape[1], len(b)) == (x, y):
            return per_expert.mT, experts_last.mT
    raise UserError(
        f"the adapter of {site.key} has shapes {tuple(a.shape)} and {tuple(b.shape)}, and the weight is "
        f"{(n, x, y) if site.stacked else (x, y)}"
    )
