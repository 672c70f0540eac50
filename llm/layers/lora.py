"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685): beside a weight W of n_out outputs and n_in inputs, A (r, n_in)
and B (n_out, r). What the weight makes of x becomes W x + s B A x; B begins at 0, and so the adapter at nothing.

A token table (V, D) has them too, B (V, r) and A (r, D): a token's vector becomes W[t] + s B[t] A, which is the same
W + s B A whether the table is looked up or, tied, multiplied with.

They are cut as their weight is: where its outputs are cut B is, and A is whole inside the region; where its inputs are
A is, and B is whole. Either way what is whole makes one term of its gradient on each rank, and of the sum that leaves
the region. A begins as PEFT's does: uniform in +-1 / sqrt(n_in).
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.args.lora import LoraArgs
from llm.init import Draw, Uniform
from llm.kernels.graph_breaks import graph_break
from llm.layers.dropout import dropped
from llm.layers.parameter import ZEROS, ParamInfo, Rows

LORA_A, LORA_B = "lora_a", "lora_b"
TOKEN_ROWS = "token_rows"


def adapter_rows(weight: ParamInfo, lora: LoraArgs | None) -> Rows:
    """Of the adapter of a weight (n_out, n_in)."""
    if lora is None:
        return {}
    n_out, n_in = weight.shape
    a = _cut_with(weight, 1, (lora.rank, n_in), Uniform(1 / math.sqrt(n_in)))
    return {LORA_A: replace(a, active=1.0), LORA_B: _cut_with(weight, 0, (n_out, lora.rank), ZEROS)}


def stack_adapter_rows(name: str, weights: ParamInfo, lora: LoraArgs | None) -> Rows:
    """Of the adapters of a stack of weights (E, n_in, n_out): A (E, n_in, r) and B (E, r, n_out)."""
    if lora is None:
        return {}
    n_stacked, n_in, n_out = weights.shape
    a = _cut_with(weights, 1, (n_stacked, n_in, lora.rank), Uniform(1 / math.sqrt(n_in)))
    b = _cut_with(weights, 2, (n_stacked, lora.rank, n_out), ZEROS)
    return {f"{name}_{LORA_A}": a, f"{name}_{LORA_B}": b}


def token_row_rows(weight: ParamInfo, lora: LoraArgs | None) -> Rows:
    """Of what is added to some rows of a table or output matrix (V, D): (tokens, D), whole on every rank, from 0 on."""
    if lora is None or lora.token_rows is None:
        return {}
    first, end = lora.token_rows
    plain = replace(weight, tensor_dim=None, decay=False, may_be_int8=False)
    return {TOKEN_ROWS: replace(plain, shape=(end - first, weight.shape[1]), kind="adapter", init=ZEROS)}


def _cut_with(weight: ParamInfo, dim: int, shape: tuple[int, ...], init: Draw) -> ParamInfo:
    """A row of this shape, which has dimension `dim` of the weight, and is cut where that is."""
    tensor_dim, grain = (dim, weight.grain) if weight.tensor_dim == dim else (None, None)
    cut = replace(weight, tensor_dim=tensor_dim, grain=grain, decay=True, may_be_int8=False)
    return replace(cut, shape=shape, kind="adapter", init=init)


class Adapted(nn.Module):
    """A module whose weight may have an adapter."""

    def add_adapter(self, lora: LoraArgs | None, n_in: int, n_out: int) -> None:
        """Called once, when the module has its other parameters."""
        self.scale = 0.0 if lora is None else lora.scale
        self.dropout = 0.0 if lora is None else lora.dropout
        self.site, self.first_input = 0, 0
        """Key of the module's name; number of the first input of which this rank has the weights."""
        self.lora_a = None if lora is None else nn.Parameter(torch.empty(lora.rank, n_in))
        self.lora_b = None if lora is None else nn.Parameter(torch.empty(n_out, lora.rank))

    def narrowed(self, x: Tensor, keys_N: Tensor | None = None) -> Tensor:
        """s A x, (..., r), of a module with an adapter. keys_N: of x's tokens, where its dropout is on."""
        assert self.lora_a is not None
        if keys_N is not None and self.dropout:
            x = self._dropped(x, keys_N)
        return F.linear(x, self.lora_a) * self.scale

    @graph_break  # else each layer would be compiled for its own site
    def _dropped(self, x: Tensor, keys_N: Tensor) -> Tensor:
        return dropped(x, keys_N, self.site, self.dropout, self.first_input)


class VocabularyAdapted(Adapted):
    """A table or output matrix (V, D), of whose rows some may train whole."""

    weight: nn.Parameter

    def add_token_rows(self, lora: LoraArgs | None, dim: int) -> None:
        """Called after `add_adapter`."""
        self.first_token, end = (0, 0) if lora is None or lora.token_rows is None else lora.token_rows
        self.token_rows = nn.Parameter(torch.empty(end - self.first_token, dim)) if end else None

    def of_tokens(self, tokens: Tensor) -> Tensor | None:
        """What is added to the vectors of these tokens; None where no rows train."""
        if self.token_rows is None:
            return None
        row = tokens - self.first_token
        others = (row < 0) | (row >= len(self.token_rows))
        return F.embedding(row.masked_fill(others, 0), self.token_rows).masked_fill(others.unsqueeze(-1), 0)

    def with_token_rows(self, weight_VD: Tensor, first: int) -> Tensor:
        """The weight, whose own first row is of token `first`, and what is added to its rows. A rank that has none of
        them adds nothing all the same, so that it has a gradient to be summed with the others'."""
        if self.token_rows is None:
            return weight_VD
        place = self.first_token - first
        low, high = (min(max(x, 0), len(weight_VD)) for x in (place, place + len(self.token_rows)))
        added = self.token_rows[low - place : high - place] if low < high else self.token_rows[:0]
        return torch.cat([weight_VD[:low], weight_VD[low:high] + added, weight_VD[high:]])


class AdapterNames(NamedTuple):
    """The parameters of an adapter."""

    a: str
    b: str
    rank: int


def adapters_in(table: Mapping[str, ParamInfo]) -> dict[str, AdapterNames]:
    """The adapters among the parameters of a model, by the name of their weight: X.lora_a beside X.weight, and beside
    X.w1, which is a stack, X.w1_lora_a."""
    found = {}
    for name, row in table.items():
        stem, found_a, _ = name.partition(LORA_A)
        if row.kind == "adapter" and found_a:
            weight = f"{stem}weight" if stem.endswith(".") else stem.removesuffix("_")
            found[weight] = AdapterNames(name, f"{stem}{LORA_B}", row.shape[0 if stem.endswith(".") else -1])
    return found
