"""Which graphs there are, by name."""

from collections.abc import Callable, Mapping
from typing import Literal

from llm.errors import UserError
from llm.export.graphs import Encoder, Graph, Plain, Step
from llm.export.refusals import refuse_unexportable
from llm.export.sides import EncoderDecoder, SidedStep, SourceEncoder
from llm.model import LLM

What = Literal["llm", "step", "encoder", "encoder_decoder"]
Graphs = Mapping[What, Callable[[LLM], Graph]]
PLAIN: Graphs = {"llm": Plain, "step": Step, "encoder": Encoder}
SIDED: Graphs = {"encoder_decoder": EncoderDecoder, "encoder": SourceEncoder, "step": SidedStep}
"""Of a model with an encoder beside its decoder."""


def graph_of(model: LLM, what: What) -> Graph:
    """The model as the graph of this name. UserError naming what of it cannot be exported."""
    refuse_unexportable(model.args)
    graphs = SIDED if model.args.encoder_layers else PLAIN
    if what not in graphs:
        raise UserError(f"{what}: model.encoder_layers={model.args.encoder_layers}; possible are {', '.join(graphs)}")
    return graphs[what](model)
