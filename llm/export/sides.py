"""The graphs of an encoder-decoder. Each row is one document: the target sees the source of its row.

Shapes: B batch, T target tokens, S source tokens, L layers of the decoder, K kv heads, d head width, D model width.
"""

from dataclasses import replace

import torch
from torch import Tensor

from llm.datatypes import TransformerInput
from llm.export.attend import GraphAcross, GraphAttend, StepAttend, graph_context
from llm.export.graphs import Graph, Port, Ports, Step, counted
from llm.layers.block import Block
from llm.layers.context import Context
from llm.layers.encoder import encoder_units
from llm.model import LLM


class Sided(Graph):
    """What the graphs of both sides have in common."""

    def source_rows(self) -> Ports:
        """What comes in of the source; a negative position is padding, which no token sees."""
        return self.rows("source", "source", "source") | {"source_positions": Port(torch.int64, ("batch", "source"))}

    def source_context(self, source: Tensor, positions: Tensor) -> Context:
        """What the encoder's layers share."""
        attend = GraphAttend(positions, causal=False)
        return graph_context(self.args, self.model.encoder_specs, source, positions, attend)

    def crossed(self) -> Port:
        """Keys or values of the source, for all layers of the decoder."""
        args = self.args
        return Port(self.dtype, (args.n_layers, "batch", "source", args.kv_heads, args.head_width))


class SourceEncoder(Sided):
    """What the encoder makes of sources, and the keys and values of it that the decoder's layers attend to, which the
    steps are given."""

    def __init__(self, model: LLM) -> None:
        super().__init__(model)
        self.inputs = self.source_rows()
        memory = Port(self.dtype, ("batch", "source", model.args.dim))
        self.outputs = {"memory": memory, "cross_keys": self.crossed(), "cross_values": self.crossed()}

    def forward(self, source: Tensor, source_positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        of_source = self.source_context(source, source_positions)
        ctx = Context(shape=of_source.shape, source=of_source)
        inputs = TransformerInput.of(source)
        inputs.source = TransformerInput.of(source)
        memory = self.model.embed_source(inputs, ctx)
        for unit in encoder_units(self.args):
            memory, _ = self.model.encoded(unit, memory, ctx)
        blocks = [block for block in self.model.layers if isinstance(block, Block)]
        keys, values = zip(*(block.cross.of_memory(memory, ctx) for block in blocks), strict=True)
        return memory, torch.stack(keys), torch.stack(values)


class EncoderDecoder(Sided):
    """Logits of whole targets, positions counted from 0, and their sources. Targets that are shorter are filled up
    behind, with any token."""

    def __init__(self, model: LLM) -> None:
        super().__init__(model)
        self.inputs, self.outputs = self.source_rows() | self.rows(), self.predictions()

    def forward(self, source: Tensor, source_positions: Tensor, rows: Tensor) -> Tensor:
        positions = counted(rows)
        ctx = self.context(rows, positions, GraphAttend(positions, causal=True))
        ctx = replace(ctx, source=self.source_context(source, source_positions), across=GraphAcross(source_positions))
        return self.predicted(self.hidden(rows, ctx, source))


class SidedStep(Step):
    """A step of the decoder: besides what any step is given, the keys and values of the source, as they left the
    encoder's graph."""

    def __init__(self, model: LLM) -> None:
        super().__init__(model)
        crossed = Sided.crossed(self)  # type: ignore[arg-type]  # of any graph
        self.inputs = {
            **self.inputs,
            "source_positions": Port(torch.int64, ("batch", "source")),
            "cross_keys": crossed,
            "cross_values": crossed,
        }

    def forward(  # type: ignore[override]  # more comes in
        self,
        rows: Tensor,
        positions: Tensor,
        past_positions: Tensor,
        past_keys: Tensor,
        past_values: Tensor,
        source_positions: Tensor,
        cross_keys: Tensor,
        cross_values: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        attend = StepAttend(positions, past_positions, past_keys, past_values)
        across = GraphAcross(source_positions, cross_keys, cross_values)
        ctx = replace(self.context(rows, positions, attend), across=across)
        return self.predicted(self.hidden(rows, ctx)), attend.positions, *attend.remembered()
