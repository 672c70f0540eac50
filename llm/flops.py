"""Floating-point operations of a model, unit by unit: one token, forward and backward. Those of a vision tower are
shared out among the tokens.

Counted as in PaLM (Chowdhery et al. 2022, arXiv:2204.02311, appendix B): 6 for each parameter that a token meets in a
matrix product or norm, and what a layer's mixer adds to that. Attention adds 12 times the width of its heads times the
tokens that it spans: those of the sequence, or of a shorter window or chunk; across to an encoder, those of the source.
Work that a layout or a setting adds (recomputed activations, padding) does not count. A parameter beside which adapters
train makes no gradient of its own: it counts 4.

Of an encoder-decoder, a token is one of the target, with its share of the work on the source: that on as many source
tokens as there are for each of the target.
"""

from collections import Counter
from fractions import Fraction

from llm.args import ModelArgs, VisionArgs
from llm.layers.mixers import MIXERS
from llm.layers.parameter import VISION, ParamInfo
from llm.parameters import ParameterTable
from vision.encoder import layer_args

TEXT_PER_SLOT = 3
"""Tokens of text for each that an image takes, where nothing is known of the data."""


def unit_flops(
    args: ModelArgs, seq_len: int, tiles_per_token: Fraction | None = None, source_len: int | None = None
) -> dict[str, int]:
    """Of each unit (`ParamInfo.unit`) but the token table, on sequences of `seq_len`; args must have a vocabulary. A
    table copies rows, which is no arithmetic; where it is the output matrix, too, that work is the output's. Of a model
    of values what stands in its place is a product.

    tiles_per_token: of images, for the vision tower; by default a quarter of all tokens stand for images. source_len:
    source tokens of a row, where there is an encoder; by default as many as target tokens.
    """
    source = seq_len if source_len is None else source_len
    share, found = Fraction(source, seq_len), Counter[str]()
    for name, row in ParameterTable.of(args).items():
        if row.unit != VISION:
            copied, work = row.unit == "tok_embeddings" and args.input_dim is None, _product(args, row)
            found["output" if copied else row.unit] += round(work * share) if _meets_source(name) else work
    if args.vision is not None:
        tiles = usual_tiles(args.vision) if tiles_per_token is None else tiles_per_token
        found[VISION] = round(tile_flops(args) * tiles)
    for spec in args.layer_specs():
        found[spec.unit] += MIXERS[spec.mixer.name].flops(args, spec, seq_len)
        if spec.cross:
            found[spec.unit] += 12 * args.n_heads * args.head_width * source
    for spec in args.encoder_specs():
        found[spec.unit] += round(MIXERS[spec.mixer.name].flops(args, spec, source) * share)
    return dict(found)


def _meets_source(name: str) -> bool:
    """Whether it is source tokens that a parameter meets: in the encoder, and where keys and values are made of what it
    made of them.
    """
    return name.startswith("encoder.") or ".cross.wk." in name or ".cross.wv." in name


def token_flops(
    args: ModelArgs,
    seq_len: int,
    tiles_per_token: Fraction | None = None,
    logits: bool = True,
    source_len: int | None = None,
) -> int:
    """Of the whole model. logits: whether tokens meet the output matrix, as they do not where labels alone are learned.
    """
    found = unit_flops(args, seq_len, tiles_per_token, source_len)
    return sum(found.values()) - (0 if logits else found["output"])


def usual_tiles(vision: VisionArgs) -> Fraction:
    """Tiles of images for each token, where nothing is known of the data."""
    return Fraction(1, (1 + TEXT_PER_SLOT) * vision.tokens_per_tile)


def tile_flops(args: ModelArgs) -> int:
    """Of a tile, or a native picture of the size of a window, in the vision tower and its projection; 0 without."""
    vision = args.vision
    if vision is None:
        return 0
    places, slots, total = vision.places, vision.tokens_per_tile, 0
    for name, row in ParameterTable.of(args).items():
        if row.unit == VISION:
            after = "adapter." in name or name.startswith("vision_projection.")
            total += _product(args, row) * (slots if after else vision.grid**2 if "patch." in name else places)
    tower = layer_args(vision)
    return total + sum(places * MIXERS["attn"].flops(tower, spec, places) for spec in tower.layer_specs())


def _product(args: ModelArgs, row: ParamInfo) -> int:
    """Of one vector that meets a parameter."""
    frozen = args.lora is not None and row.kind != "adapter"
    return (4 if frozen else 6) * row.active_numel
