"""Weights with their adapters added, W + s B A, computed in float32 whatever the weights are kept in."""

from collections.abc import Iterator, Mapping
from math import prod

import torch
from torch import Tensor

from llm.args import ModelArgs
from llm.boxes import Box, box_shape
from llm.checkpoint.weights import Weights
from llm.errors import UserError
from llm.layers.lora import TOKEN_ROWS, adapters_in
from llm.parameters import ParameterTable

CHUNK_ELEMENTS = 2 << 20
"""Elements of a weight that are there in float32 at a time."""


class Merged:
    """The weights of a model without adapters, of one that has them."""

    def __init__(self, weights: Weights, args: ModelArgs) -> None:
        """args: of the model with adapters."""
        assert args.lora is not None
        self._weights, self._scale = weights, args.lora.scale
        self._adapters = adapters_in(ParameterTable.of(args))
        self._token_rows = args.lora.token_rows
        self._with_token_rows = {"tok_embeddings.weight", "output.weight"} if self._token_rows else set()

    def read(self, name: str, box: Box, out: Tensor) -> Tensor:
        if name not in self._adapters and name not in self._with_token_rows:
            return self._weights.read(name, box, out)
        for part in _parts(box):
            shape, (low, high) = box_shape(part), part[0]
            values = self._weights.read(name, part, torch.empty(shape))
            if name in self._adapters:
                first, last = self._factors(name, part, (low, high))
                values += self._scale * (first @ last)
            if name in self._with_token_rows:
                self._add_token_rows(name, part, values)
            out[low - box[0][0] : high - box[0][0]].copy_(values)
        return out

    def _add_token_rows(self, name: str, part: Box, values: Tensor) -> None:
        """Add what of them lies in a part of a table or output matrix."""
        assert self._token_rows is not None
        (first, last), columns = part
        low, high = max(first, self._token_rows[0]), min(last, self._token_rows[1])
        if low < high:
            box = (low - self._token_rows[0], high - self._token_rows[0]), columns
            added = self._weights.read(name.replace("weight", TOKEN_ROWS), box, torch.empty(box_shape(box)))
            values[low - first : high - first] += added

    def _factors(self, name: str, part: Box, rows: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Whose product is that part of what is added, in the form of the weight: B and A of a matrix (n_out, n_in), A
        and B of a stack (E, n_in, n_out)."""
        a, b, rank = self._adapters[name]
        inner = (0, rank)
        boxes: list[tuple[str, Box]] = [(b, (rows, inner)), (a, (inner, part[1]))]
        if len(part) == 3:
            boxes = [(a, (rows, part[1], inner)), (b, (rows, inner, part[2]))]
        first, last = (self._weights.read(key, of, torch.empty(box_shape(of))) for key, of in boxes)
        return first, last


def _parts(box: Box) -> Iterator[Box]:
    """Some rows of a box, or experts, at a time."""
    (first, last), *rest = box
    step = max(1, CHUNK_ELEMENTS // max(1, prod(box_shape(tuple(rest)))))
    for low in range(first, last, step):
        yield (low, min(low + step, last)), *rest


def refuse_incomplete(path: object, args: ModelArgs, held: Mapping[str, tuple[int, ...]]) -> None:
    """UserError naming the first part of an adapter that is not among the parameters `held`, or has another shape."""
    for name, row in ParameterTable.of(args).items():
        if row.kind == "adapter" and held.get(name) != row.shape:
            raise UserError(
                f"{path}: its adapter is not complete: {name} has shape {held.get(name)}, expected {row.shape}"
            )
