"""A model on its device, as its layout wants it: whole, or from the first moment only this rank's share."""

from collections.abc import Callable, Collection

import torch
from torch import nn

from llm import init
from llm.args import ModelArgs
from llm.boxes import box_shape
from llm.layers.attention import Attention
from llm.layers.embedding import Embedding
from llm.layers.ffn import FeedForward
from llm.layers.moe import MoE
from llm.layers.norm import HeadsNorm
from llm.layers.output import Output
from llm.model import EMBEDDING, LLM, OUTPUT
from llm.parallel.engine import deepspeed_private as private
from llm.parallel.expert import ExpertExchange
from llm.parallel.grid import Grid
from llm.parallel.tensor import CutVocabulary, TensorRegion, sum_gradients
from llm.parameters import ParameterTable

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_model(
    args: ModelArgs, seed: int, grid: Grid, *, units: Collection[str], zero_stage: int, precision: str
) -> LLM:
    """These units of the model, cut as `grid` says: in fp32 with their initial values, else with none, as the engine
    draws its float32 masters and rounds them to parameters.

    No rank ever holds more than its share, under ZeRO-3 of the data-parallel ranks too: an initial value is a function
    of its index, so each rank draws its own. Below ZeRO-3 the parameters are float32 until the engine casts them.
    """
    device = grid.world.device
    model, table = LLM(args, device="meta", units=units), ParameterTable.of(args)
    if args.tie_embeddings and OUTPUT in units and EMBEDDING not in units:
        private.mark_copy(model.tok_embeddings.weight)
    for module in model.modules():  # buffers are few and whole
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.zeros_like(buffer, device=device)
    _cut(model, table, grid)
    if zero_stage == 3:
        private.partition_parameters(model, DTYPES[precision], device, grid.data.handle)
    else:
        _each_parameter(model, lambda _, parameter: torch.empty_like(parameter, device=device))
    for name, parameter in model.named_parameters() if precision == "fp32" else ():
        start, values = private.share(parameter) if zero_stage == 3 else (0, parameter.data.view(-1))
        stop = start + values.numel()
        row = table[name]
        values.copy_(init.values_in_box(row.init, name, seed, row.shape, grid.box(row), start, stop))
    _connect(model, table, grid)
    return model


def _cut(model: LLM, table: ParameterTable, grid: Grid) -> None:
    """Leave of each parameter (on the meta device) this rank's box."""

    def shape_left(name: str, _: torch.Tensor) -> torch.Tensor:
        return torch.empty(box_shape(grid.box(table[name])), device="meta")

    _each_parameter(model, shape_left)


def _each_parameter(model: LLM, make: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            canonical = f"{path}.{name}" if path else name
            made = nn.Parameter(make(canonical, parameter.data))
            if private.is_copy(parameter):
                private.mark_copy(made)
            setattr(module, name, made)


def _connect(model: LLM, table: ParameterTable, grid: Grid) -> None:
    """Let the layers communicate where their weights are cut, and tell DeepSpeed how each parameter is."""
    args, layout = model.args, grid.layout
    if layout.expert > 1:
        private.register_experts(model, grid)
    for module in model.modules():
        if layout.expert > 1 and isinstance(module, MoE):
            module.exchange = ExpertExchange(grid.expert, module.moe.n_experts)
    region = TensorRegion(grid.tensor, layout.sequence_parallel) if layout.tensor > 1 else None
    if region is not None:
        vocabulary = CutVocabulary(grid.tensor, args.vocab_size)
        for module in model.modules():
            if isinstance(module, LLM | Attention | FeedForward | HeadsNorm | MoE):
                module.region = region
            if isinstance(module, Embedding | Output):
                module.vocabulary = vocabulary
            if isinstance(module, Attention):
                module.wo.adds_bias = grid.tensor.rank == 0
            if isinstance(module, FeedForward):
                module.w2.adds_bias = grid.tensor.rank == 0
            if isinstance(module, Attention) and args.kv_heads < layout.tensor:
                head = grid.tensor.rank * args.kv_heads // layout.tensor
                rows = slice(head * args.head_width, (head + 1) * args.head_width)
                module.wk.rows = module.wv.rows = rows
                if isinstance(module.k_norm, HeadsNorm):
                    module.k_norm.rows = rows
    for name, parameter in model.named_parameters():
        row = table[name]
        cut = row.cut(layout.tensor) is not None
        private.mark(parameter, cut, grid.expert.size if row.expert_dim is not None else 1)
        if region is not None and not cut and (row.in_region or layout.sequence_parallel):
            sum_gradients(parameter, grid.tensor)
