"""Floating-point operations of a model, unit by unit: one token, forward and backward.

Counted as in PaLM (Chowdhery et al. 2022, arXiv:2204.02311, appendix B): 6 for each parameter that a token meets in a
matrix product or norm, and what a layer's mixer adds to that. Attention adds 12 times the width of its heads times the
tokens that it spans: those of the sequence, or of a shorter window or chunk. Work that a layout or a setting adds
(recomputed activations, padding) does not count. A parameter beside which adapters train makes no gradient of its own:
it counts 4.
"""

from collections import Counter

from llm.args import ModelArgs
from llm.layers.mixers import MIXERS
from llm.parameters import ParameterTable


def unit_flops(args: ModelArgs, seq_len: int) -> dict[str, int]:
    """Of each unit (`ParamInfo.unit`) but the token table, on sequences of `seq_len`; args must have a vocabulary. A
    table copies rows, which is no arithmetic; where it is the output matrix, too, that work is the output's.
    """
    found: Counter[str] = Counter()
    for row in ParameterTable.of(args).values():
        frozen = args.lora is not None and row.kind != "adapter"
        found["output" if row.unit == "tok_embeddings" else row.unit] += (4 if frozen else 6) * row.active_numel
    for spec in args.layer_specs():
        found[f"layers.{spec.index}"] += MIXERS[spec.mixer.name].flops(args, spec, seq_len)
    return dict(found)


def token_flops(args: ModelArgs, seq_len: int) -> int:
    """Of the whole model."""
    return sum(unit_flops(args, seq_len).values())
