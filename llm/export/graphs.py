"""The graphs that a model can be exported as: modules whose inputs and outputs are tensors alone.

Shapes: B batch, T new tokens, S earlier ones, L layers, K kv heads, d head width, D model width, V vocabulary.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from llm.args import ModelArgs
from llm.datatypes import TransformerInput
from llm.errors import UserError
from llm.export.attend import GraphAttend, StepAttend, graph_context
from llm.export.experts import with_dense_experts
from llm.export.refusals import refuse_unexportable
from llm.model import LLM

What = Literal["llm", "step", "encoder"]
Shape = tuple[str | int, ...]
"""Sizes that change from call to call have a name."""


class Port(NamedTuple):
    """An input or output of a graph."""

    dtype: torch.dtype
    shape: Shape


def sized(shape: Shape, sizes: Mapping[str, int]) -> list[int]:
    """A shape with these sizes in the place of their names."""
    return [sizes[size] if isinstance(size, str) else size for size in shape]


class Graph(nn.Module):
    """A model to be exported, without gradients; it shares the model's parameters."""

    inputs: Mapping[str, Port]
    """By name, in the order of the arguments of `forward`."""
    outputs: Mapping[str, Port]
    """By name, in the order of the results of `forward`."""

    def __init__(self, model: LLM) -> None:
        super().__init__()
        shared: list[object] = [*model.parameters(), model._tokenizer]
        self.model = copy.deepcopy(model, {id(one): one for one in shared})
        with_dense_experts(self.model)
        self.args = model.args
        self.eval()

    def hidden(self, tokens: Tensor, positions: Tensor, attend: GraphAttend) -> Tensor:
        """Final hidden states (B, T, D)."""
        ctx = graph_context(self.args, self.model.specs, tokens, positions, attend)
        found, _ = self.model.run(self.model.units, None, TransformerInput(tokens), ctx)
        return found


class Plain(Graph):
    """Logits of whole rows of tokens, positions counted from 0. Rows that are shorter are filled up behind, with any
    token: none sees what comes after it."""

    def __init__(self, model: LLM) -> None:
        super().__init__(model)
        if not model.args.causal:
            raise UserError("model.causal=false: tokens see padding behind them; export it as `encoder`")
        self.inputs = {"tokens": Port(torch.int64, ("batch", "length"))}
        self.outputs = {"logits": Port(torch.float32, ("batch", "length", model.args.vocab_size))}

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        return self.model.logits(self.hidden(tokens, positions, GraphAttend(positions, causal=True)))


class Step(Graph):
    """New tokens after those whose keys and values are given, which may be none: (L, B, 0, K, d). What leaves is what
    the next step is given. Layers with windows or chunks see what they should; whoever calls may drop slots that none
    sees any more, of all three alike."""

    def __init__(self, model: LLM) -> None:
        super().__init__(model)
        args = model.args
        if not args.causal:
            raise UserError("model.causal=false: tokens see those behind them, so there are no steps")
        layers, heads, dtype = args.n_layers, (args.kv_heads, args.head_width), next(model.parameters()).dtype
        self.inputs = {
            "tokens": Port(torch.int64, ("batch", "length")),
            "positions": Port(torch.int64, ("batch", "length")),
            "past_positions": Port(torch.int64, ("batch", "past")),
            "past_keys": Port(dtype, (layers, "batch", "past", *heads)),
            "past_values": Port(dtype, (layers, "batch", "past", *heads)),
        }
        whole = "past + length"
        self.outputs = {
            "logits": Port(torch.float32, ("batch", "length", args.vocab_size)),
            "all_positions": Port(torch.int64, ("batch", whole)),
            "keys": Port(dtype, (layers, "batch", whole, *heads)),
            "values": Port(dtype, (layers, "batch", whole, *heads)),
        }

    def forward(
        self, tokens: Tensor, positions: Tensor, past_positions: Tensor, past_keys: Tensor, past_values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        attend = StepAttend(positions, past_positions, past_keys, past_values)
        logits = self.model.logits(self.hidden(tokens, positions, attend))
        return logits, attend.positions, *attend.remembered()


class Encoder(Graph):
    """Final hidden states of rows that are read both ways; a negative position is padding, which no token sees."""

    def __init__(self, model: LLM) -> None:
        super().__init__(model)
        args = model.args
        if args.causal and (not args.n_prediction or args.prediction_causal):
            raise UserError("model.causal=true: the model reads from left to right; export it as `llm` or `step`")
        self.inputs = {
            "tokens": Port(torch.int64, ("batch", "length")),
            "positions": Port(torch.int64, ("batch", "length")),
        }
        self.outputs = {"hidden": Port(next(model.parameters()).dtype, ("batch", "length", args.dim))}

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.hidden(tokens, positions, GraphAttend(positions, causal=False))


GRAPHS: Mapping[What, Callable[[LLM], Graph]] = {"llm": Plain, "step": Step, "encoder": Encoder}


def graph_of(model: LLM, what: What) -> Graph:
    """The model as the graph of this name. UserError naming what of it cannot be exported."""
    refuse_unexportable(model.args)
    return GRAPHS[what](model)


def most_tokens(args: ModelArgs) -> int | None:
    """How long a row can be; None = any length."""
    return args.max_seq_len if args.pos == "learned" else None
