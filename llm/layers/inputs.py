"""What a model does to token vectors before its first layer, besides scaling them: what is added for positions, and a
norm. An encoder-decoder has these of each side.
"""

from torch import nn

from llm.args import ModelArgs
from llm.args.layers import POSITIONS
from llm.layers.norm import make_norm, norm_rows
from llm.layers.parameter import Rows, under
from llm.layers.positions import POSITION_TABLE, position_rows

INPUT_NORM = "input_norm"


def add_inputs(module: nn.Module, args: ModelArgs) -> None:
    """Give a module what it has of these."""
    if (build := POSITIONS[args.pos].build) is not None:
        setattr(module, POSITION_TABLE, build(args))
    if args.input_norm:
        setattr(module, INPUT_NORM, make_norm(args, args.dim))


def input_rows(args: ModelArgs) -> Rows:
    """What their parameters are: see llm/layers/parameter.py."""
    norm = norm_rows(args, args.dim) if args.input_norm else {}
    return under(POSITION_TABLE, position_rows(args)) | under(INPUT_NORM, norm)
