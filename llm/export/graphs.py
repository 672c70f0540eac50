"""The graphs that a model without an encoder can be exported as: modules whose inputs and outputs are tensors alone.

Shapes: B batch, T new tokens, S earlier ones, L layers, K kv heads, d head width, D model width, V vocabulary.
"""

import copy
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llm.args import ModelArgs
from llm.datatypes import TransformerInput
from llm.errors import UserError
from llm.export.attend import GraphAttend, StepAttend, graph_context
from llm.export.experts import with_dense_experts
from llm.layers.context import Context
from llm.model import LLM

Shape = tuple[str | int, ...]
"""Sizes that change from call to call have a name."""


class Port(NamedTuple):
    """An input or output of a graph."""

    dtype: torch.dtype
    shape: Shape


Ports = dict[str, Port]
"""By name, in the order of arguments or results."""


def sized(shape: Shape, sizes: Mapping[str, int]) -> list[int]:
    """A shape with these sizes in the place of their names."""
    return [sizes[size] if isinstance(size, str) else size for size in shape]


class Graph(nn.Module):
    """A model to be exported, without gradients; it shares the model's parameters. What it reads are tokens, or values
    of a model that reads those; what it predicts likewise."""

    inputs: Ports
    """Arguments of `forward`."""
    outputs: Ports
    """Results of `forward`, which returns a tensor where there is one."""

    def __init__(self, model: LLM) -> None:
        super().__init__()
        shared: list[object] = [*model.parameters(), model._tokenizer]
        self.model = copy.deepcopy(model, {id(one): one for one in shared})
        with_dense_experts(self.model)
        self.args = model.args
        self.dtype = next(model.parameters()).dtype
        self.eval()

    def rows(self, size: str = "length", tokens: str = "tokens", values: str = "values") -> Ports:
        """What comes in of one side, by the name of either kind."""
        if self.args.input_dim is None:
            return {tokens: Port(torch.int64, ("batch", size))}
        return {values: Port(torch.float32, ("batch", size, self.args.input_dim))}

    def predictions(self) -> Ports:
        """What goes out of each row."""
        if self.args.output_dim is None:
            return {"logits": Port(torch.float32, ("batch", "length", self.args.vocab_size))}
        return {"outputs": Port(torch.float32, ("batch", "length", self.args.output_dim))}

    def predicted(self, hidden: Tensor) -> Tensor:
        """That, of final hidden states."""
        if self.args.output_dim is None:
            return self.model.logits(hidden)
        return self.model.in_units(self.model.values(hidden))

    def context(self, rows: Tensor, positions: Tensor, attend: GraphAttend) -> Context:
        """What the decoder's layers share, or those of a model without an encoder."""
        return graph_context(self.args, self.model.specs, rows, positions, attend)

    def hidden(self, rows: Tensor, ctx: Context, source: Tensor | None = None) -> Tensor:
        """Final hidden states (B, T, D)."""
        inputs = TransformerInput.of(rows)
        if source is not None:
            inputs.source = TransformerInput.of(source)
        found, _ = self.model.run(self.model.units, None, inputs, ctx)
        return found


def counted(rows: Tensor) -> Tensor:
    """Positions from 0, (1, T)."""
    return torch.arange(rows.shape[1], device=rows.device)[None]


class Plain(Graph):
    """Logits of whole rows of tokens, positions counted from 0. Rows that are shorter are filled up behind, with any
    token: none sees what comes after it."""

    def __init__(self, model: LLM) -> None:
        super().__init__(model)
        if not model.args.causal:
            raise UserError("model.causal=false: tokens see padding behind them; export it as `encoder`")
        self.inputs, self.outputs = self.rows(), self.predictions()

    def forward(self, rows: Tensor) -> Tensor:
        positions = counted(rows)
        return self.predicted(self.hidden(rows, self.context(rows, positions, GraphAttend(positions, causal=True))))


class Step(Graph):
    """New tokens after those whose keys and values are given, which may be none: (L, B, 0, K, d). What leaves is what
    the next step is given. Layers with windows or chunks see what they should; whoever calls may drop slots that none
    sees any more, of all three alike."""

    def __init__(self, model: LLM) -> None:
        super().__init__(model)
        if not model.args.causal:
            raise UserError("model.causal=false: tokens see those behind them, so there are no steps")
        past, whole = self.kept("past"), self.kept("past + length")
        self.inputs = self.rows() | {
            "positions": Port(torch.int64, ("batch", "length")),
            "past_positions": Port(torch.int64, ("batch", "past")),
            "past_keys": past,
            "past_values": past,
        }
        self.outputs = self.predictions() | {
            "all_positions": Port(torch.int64, ("batch", "past + length")),
            "all_keys": whole,
            "all_values": whole,
        }

    def kept(self, size: str) -> Port:
        """Keys or values of so many tokens, for all layers."""
        args = self.args
        return Port(self.dtype, (args.n_layers, "batch", size, args.kv_heads, args.head_width))

    def forward(
        self, rows: Tensor, positions: Tensor, past_positions: Tensor, past_keys: Tensor, past_values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        attend = StepAttend(positions, past_positions, past_keys, past_values)
        found = self.predicted(self.hidden(rows, self.context(rows, positions, attend)))
        return found, attend.positions, *attend.remembered()


class Encoder(Graph):
    """Final hidden states of rows that are read both ways; a negative position is padding, which no token sees."""

    def __init__(self, model: LLM) -> None:
        super().__init__(model)
        args = model.args
        if args.causal and (not args.n_prediction or args.prediction_causal):
            raise UserError("model.causal=true: the model reads from left to right; export it as `llm` or `step`")
        self.inputs = self.rows() | {"positions": Port(torch.int64, ("batch", "length"))}
        self.outputs = {"hidden": Port(self.dtype, ("batch", "length", args.dim))}

    def forward(self, rows: Tensor, positions: Tensor) -> Tensor:
        return self.hidden(rows, self.context(rows, positions, GraphAttend(positions, causal=False)))


def most_tokens(args: ModelArgs) -> int | None:
    """How long a row can be; None = any length."""
    return args.max_seq_len if args.pos == "learned" else None
