"""A model on its device, as its layout wants it: whole, or from the first moment only this rank's share."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from llm import init
from llm.adapters.int8 import Read, fill, int8_weights, use_int8
from llm.args import ModelArgs
from llm.boxes import Box, box_shape
from llm.layers.embedding import Embedding
from llm.layers.ffn import FeedForward
from llm.layers.lora import LORA_A, Adapted
from llm.layers.moe import Experts, MoE
from llm.layers.output import Output
from llm.layers.region import InRegion
from llm.model import LLM
from llm.parallel.expert import ExpertExchange
from llm.parallel.grid import Grid
from llm.parallel.tensor import CutVocabulary, TensorRegion
from llm.parameters import ParameterTable


class Storage(Protocol):
    """Where the values of parameters lie on a rank."""

    def allocate(self, model: LLM, device: torch.device) -> None:
        """Give each parameter, which is on the meta device, memory; its values are left unset."""

    def share(self, parameter: nn.Parameter) -> tuple[int, Tensor]:
        """(start, values) of what this rank has of a flattened parameter: a view."""


class Whole:
    """All of each parameter, in float32."""

    def allocate(self, model: LLM, device: torch.device) -> None:
        _each_parameter(model, lambda _, parameter: torch.empty_like(parameter, device=device))

    def share(self, parameter: nn.Parameter) -> tuple[int, Tensor]:
        return 0, parameter.data.view(-1)


def build_model(
    args: ModelArgs,
    seed: int | None,
    grid: Grid,
    *,
    units: Collection[str],
    storage: Storage | None = None,
    table: ParameterTable | None = None,
) -> LLM:
    """These units of the model, cut as `grid` says, with their initial values, or without a seed with none.

    No rank ever holds more than its share: an initial value is a function of its index, so each rank draws its own.
    table: of the model, where some of its parameters are frozen; by default all train.
    """
    storage = storage or Whole()
    device = grid.world.device
    model, table = LLM(args, device="meta", units=units), table or ParameterTable.of(args)
    for module in model.modules():  # buffers are few and whole
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.zeros_like(buffer, device=device)
    _cut(model, table, grid)
    for name, parameter in list(model.named_parameters()):
        if table[name].int8:  # before anything asks for the parameters: for all of it, this is none
            path, _, own = name.rpartition(".")
            use_int8(model.get_submodule(path), own, tuple(parameter.shape), device)
    storage.allocate(model, device)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(table[name].trainable)
    if seed is not None:
        draw(dict(model.named_parameters()), table, grid, storage, seed)
    _connect(model, table, grid)
    return model


def draw(
    parameters: Mapping[str, nn.Parameter], table: ParameterTable, grid: Grid, storage: Storage, seed: int
) -> None:
    """Give parameters, which go by their canonical names, their initial values."""
    for name, parameter in parameters.items():
        (start, values), row = storage.share(parameter), table[name]
        stop = start + values.numel()
        values.copy_(init.values_in_box(row.init, name, seed, row.shape, grid.box(row), start, stop))


def fill_int8(model: LLM, table: ParameterTable, grid: Grid, read: Read) -> None:
    """Put this rank's part of what is kept in int8 in place."""
    for name, weight in int8_weights(model):
        fill(weight, read, name, table[name].shape, grid.box(table[name]))


def drawn(table: ParameterTable, seed: int) -> Read:
    """Reads initial values."""

    def read(name: str, box: Box, out: Tensor) -> Tensor:
        row = table[name]
        return out.copy_(init.values_in_box(row.init, name, seed, row.shape, box, 0, out.numel()).view(out.shape))

    return read


def _cut(model: LLM, table: ParameterTable, grid: Grid) -> None:
    """Leave of each parameter (on the meta device) this rank's box."""

    def shape_left(name: str, _: torch.Tensor) -> torch.Tensor:
        return torch.empty(box_shape(grid.box(table[name])), device="meta")

    _each_parameter(model, shape_left)


def _each_parameter(model: LLM, make: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            canonical = f"{path}.{name}" if path else name
            setattr(module, name, nn.Parameter(make(canonical, parameter.data)))


def _connect(model: LLM, table: ParameterTable, grid: Grid) -> None:
    """Let the layers communicate where their weights are cut."""
    args, layout = model.args, grid.layout
    for name, module in model.named_modules():
        if isinstance(module, Adapted) and module.lora_a is not None:
            module.first_input = grid.box(table[f"{name}.{LORA_A}"])[1][0]
        elif isinstance(module, Experts):
            module.take_hidden_from(grid.box(table[f"{name}.w2"])[1][0])
        elif isinstance(module, FeedForward) and module.dropout is not None:
            module.dropout = replace(module.dropout, first=grid.box(table[f"{name}.w2.weight"])[1][0])
        if layout.expert > 1 and isinstance(module, MoE):
            module.exchange = ExpertExchange(grid.expert, module.moe.n_experts)
    model.first_head = args.n_heads // layout.tensor * grid.tensor.rank
    region = TensorRegion(grid.tensor, layout.sequence_parallel) if layout.tensor > 1 else None
    if region is not None:
        vocabulary = CutVocabulary(grid.tensor, args.vocab_size)
        for module in model.modules():
            if isinstance(module, InRegion):
                module.region = region
                module.take_share(grid.tensor.rank, layout.tensor)
            if isinstance(module, Embedding | Output):
                module.vocabulary = vocabulary
