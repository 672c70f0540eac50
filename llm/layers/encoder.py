"""The encoder of an encoder-decoder: layers that read the source both ways, what is added to its token vectors, and a
norm after the last layer. What it makes of the source is the memory that the decoder's layers attend to.

The token table is the model's own; of a model of values the source has a linear map of its own. Which of the parts a
module has follows from the units that it is to have; they are run one by one, by name.
"""

from collections.abc import Collection

from torch import nn

from llm.args import ModelArgs
from llm.layers.block import Block
from llm.layers.features import FeatureEmbedding
from llm.layers.inputs import add_inputs, input_rows
from llm.layers.norm import make_norm, norm_rows
from llm.layers.parameter import Rows, in_unit, of_unit, under

ENCODER = "encoder"
"""What a model calls it."""
ENCODER_NORM = "encoder.norm"


def encoder_units(args: ModelArgs) -> tuple[str, ...]:
    """The units of a model that are its encoder's, in order; none without one."""
    return (*(spec.unit for spec in args.encoder_specs()), *[ENCODER_NORM] * (args.encoder_layers > 0))


class Encoder(nn.Module):
    """See the top of this file."""

    def __init__(self, args: ModelArgs, units: Collection[str], embeds: bool) -> None:
        """units: the names of those of its units that it is to have; embeds: whether it has what embeds the source."""
        super().__init__()
        if embeds and args.input_dim is not None:
            self.tok_embeddings = FeatureEmbedding(args)
        if embeds:
            add_inputs(self, args)
        blocks = (Block(args, spec) if spec.unit in units else None for spec in args.encoder_specs())
        self.layers = nn.ModuleList(blocks)  # type: ignore[arg-type]  # None keeps the others' numbers
        if ENCODER_NORM in units:
            self.norm = make_norm(args, args.dim, last=True) if args.has_final_norm else None

    @staticmethod
    def declare_embedding(args: ModelArgs, unit: str) -> Rows:
        """What the parameters are (llm/layers/parameter.py) that embed the source, in the unit of the token table."""
        if not args.encoder_layers:
            return {}
        rows = {} if args.input_dim is None else under(f"{ENCODER}.tok_embeddings", FeatureEmbedding.declare(args))
        return of_unit(unit, rows | under(ENCODER, input_rows(args)))

    @staticmethod
    def declare(args: ModelArgs) -> Rows:
        """What the parameters of its own units are; none without an encoder."""
        rows: Rows = {}
        for spec in args.encoder_specs():
            rows |= in_unit(spec.unit, Block.declare(args, spec))
        if args.encoder_layers and args.has_final_norm:
            rows |= in_unit(ENCODER_NORM, norm_rows(args, args.dim, last=True))
        return rows
