"""The context of a forward: what all of its layers share, made of its inputs.

Shapes: B batch, T tokens, S source tokens, M number of MoE layers, E experts.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from llm.args import LayerSpec, ModelArgs
from llm.args.layers import attention_specs
from llm.args.route import RouteArgs
from llm.cache import Ints, Remembered
from llm.datatypes import TransformerInput
from llm.layers.across import AcrossMasks, AttendAcross
from llm.layers.branches import BranchMasks
from llm.layers.context import Budget, Context, angles, temperature
from llm.layers.dropout import AttentionDropout, source_keys
from llm.layers.features import check_features
from llm.layers.masks import Attend, AttentionMasks, document_lengths, starts
from llm.layers.moe import routing_shape
from llm.layers.positions import POSITIONS, check_positions
from llm.layers.strides import Strides


def make_context(
    args: ModelArgs,
    specs: Sequence[LayerSpec],
    inputs: TransformerInput,
    cache: Remembered | None,
    expert_counts: Tensor | None,
    keys_N: Tensor | None,
    each_row: bool,
    cut_sequence: bool,
    first_head: int = 0,
    place: str = "layers.{layer}",
) -> Context:
    """What the layers of these specs share in one forward. each_row: positions of each row by itself, also where all
    rows have the same; first_head: number of the first head of queries of this rank; place: where in the model they
    are; for the rest see `LLM.forward` and `Context`.

    Raises ValueError where the inputs do not fit the model or each other, before the cache changes.
    """
    _check(args, inputs, expert_counts)
    device = inputs.tokens.device
    first_position_B = None if cache is None else cache.first_positions(len(inputs.tokens))
    positions_BT, document_starts = inputs.resolve(first_position_B)
    check_positions(args, positions_BT)
    lengths: Tensor | None = None
    agree = not each_row and (positions_BT == positions_BT[:1]).all()
    if args.rope_scaling is not None and args.rope_scaling.kind == "dynamic":
        lengths, agree = torch.tensor(document_lengths(positions_BT, document_starts), device=device), False
    positions = torch.tensor(positions_BT[:1] if agree else positions_BT, device=device)
    attention, heads = attention_specs(specs), [spec.heads for spec in specs if spec.heads is not None]
    stateful, strided = any(spec.stateful for spec in specs), any(spec.stride > 1 for spec in specs)
    padded = (args.moe is not None or stateful) and (positions_BT < 0).any()
    if inputs.parents is not None and (stateful or lengths is not None or cache is not None):
        raise ValueError(
            "inputs.parents are for attention alone, without a cache, and not for dynamic RoPE, which turns by the "
            "length of the whole document"
        )
    causal = inputs.causal_rows(args.causal)
    if causal is not True:
        _check_both_ways(specs, inputs, cache)
    dropout = None
    if args.attn_dropout and keys_N is not None:
        if cache is not None or inputs.parents is not None:
            raise ValueError("rows with a cache or inputs.parents drop no attention weights: give no keys_N")
        dropout = AttentionDropout(keys_N.view(inputs.tokens.shape), args.attn_dropout, first_head, place)
    attend: Attend
    if cache is not None:
        attend = cache.extend(positions_BT, document_starts, device)
    elif inputs.parents is None:
        attend = AttentionMasks(attention, positions_BT, document_starts, device, causal, dropout)
    else:
        attend = BranchMasks(attention, positions_BT, document_starts, inputs.parents.numpy(), device)
    n_rows, row_length = inputs.tokens.shape
    return Context(
        shape=(n_rows, row_length),
        starts_BT=torch.from_numpy(starts(positions_BT, document_starts)).to(device) if stateful else None,
        documents_BT=_documents(positions_BT, document_starts, device) if stateful and cache is None else None,
        strides=Strides(positions_BT, document_starts, first_position_B, device) if strided else None,
        budget=_budget(args.route, positions_BT, document_starts, device) if args.route is not None else None,
        attend=attend,
        states=cache,
        positions_BT=None if POSITIONS[args.pos].build is None else positions,
        rotation_BT1m=angles(args, positions, lengths) if any(one.rope for one in heads) else None,
        temperature_BT11=temperature(args, positions) if any(one.temperature for one in heads) else None,
        attention_dropout=dropout,
        valid_BT=torch.from_numpy(positions_BT >= 0).to(device) if padded else None,
        expert_counts=expert_counts,
        keys_N=keys_N,
        residual_keys_n=keys_N,
        cut_sequence=cut_sequence,
    )


def _budget(route: RouteArgs, positions_BT: Ints, document_starts: Ints, device: torch.device) -> Budget:
    """What the documents of these rows may spend in a routed layer."""
    # in float64, where a rate times a length is rounded alike everywhere
    bounds_BT = np.floor(route.max_rate * (positions_BT.astype(np.float64) + 1) + route.burst).astype(np.int64)
    begins = np.zeros(positions_BT.size, dtype=np.int64)
    begins[document_starts] = 1
    documents, there = begins.cumsum() - 1, positions_BT.reshape(-1) >= 0
    tokens, bound = np.zeros(begins.sum(), np.int64), np.zeros(begins.sum(), np.int64)
    np.add.at(tokens, documents, there)
    np.maximum.at(bound, documents, np.where(there, bounds_BT.reshape(-1), 0))
    rows = np.zeros(len(positions_BT), np.int64)
    np.add.at(rows, document_starts // positions_BT.shape[1], np.minimum(tokens, bound))
    return Budget(torch.from_numpy(bounds_BT).to(device), max(1, int(rows.max())))


def _documents(positions_BT: Ints, document_starts: Ints, device: torch.device) -> Tensor | None:
    """The number of each token's document in its row, (B, T) int64; None where no row has tokens of two. ValueError
    where padding stands among the tokens of a document, which a state would have to pass.
    """
    begins = np.zeros(positions_BT.size, dtype=np.int64)
    begins[document_starts] = 1
    documents_BT, valid_BT = begins.reshape(positions_BT.shape).cumsum(1), positions_BT >= 0
    before, after = valid_BT[:, :-1], valid_BT[:, 1:]
    again = ~before & after & (documents_BT[:, :-1] == documents_BT[:, 1:])
    for row, column in np.argwhere(again):
        if (valid_BT[row, :column] & (documents_BT[row, :column] == documents_BT[row, column])).any():
            raise ValueError(
                f"row {row} has padding among the tokens of a document, before token {column + 1}; mixers with a state "
                f"take it before or behind them"
            )
    held = [np.unique(documents_BT[row][valid_BT[row]]).size for row in range(len(documents_BT))]
    return torch.from_numpy(documents_BT).to(device) if max(held) > 1 else None


def make_contexts(
    args: ModelArgs,
    specs: Sequence[LayerSpec],
    encoder_specs: Sequence[LayerSpec],
    inputs: TransformerInput,
    cache: Remembered | None,
    expert_counts: Tensor | None,
    keys_N: Tensor | None,
    each_row: bool,
    cut_sequence: bool,
    first_head: int = 0,
) -> Context:
    """What `make_context` makes; where there is an encoder, with what its layers share, and attention to what they
    make. ValueError where `inputs.source` does not fit."""
    how = each_row, cut_sequence, first_head
    if not encoder_specs:
        return make_context(args, specs, inputs, cache, expert_counts, keys_N, *how)
    source, device = inputs.source, inputs.tokens.device
    if source is not None:
        _check_source(source, len(inputs.tokens))
    elif cache is None:
        raise ValueError(
            f"model.encoder_layers={args.encoder_layers}: the encoder needs inputs.source, what it is to read"
        )
    across: AttendAcross
    sides = None if source is None else source.resolve()
    if cache is not None:
        across = cache.across(*inputs.resolve(cache.first_positions(len(inputs.tokens))), sides, device)
    ctx = make_context(args, specs, inputs, cache, expert_counts, keys_N, *how)
    if source is None or sides is None:
        return replace(ctx, across=across)
    of_source = None if keys_N is None else source_keys(keys_N, *source.tokens.shape)
    both_ways = replace(source, causal=False)
    of_encoder = make_context(
        args, encoder_specs, both_ways, None, expert_counts, of_source, *how, place="encoder.layers.{layer}"
    )
    if cache is None:
        dropout = None
        if args.attn_dropout and keys_N is not None:
            place = "layers.{layer}.cross"
            dropout = AttentionDropout(keys_N.view(inputs.tokens.shape), args.attn_dropout, first_head, place)
        across = AcrossMasks(*inputs.resolve(), *sides, device, dropout)
    return replace(ctx, source=of_encoder, across=across)


def _check_source(source: TransformerInput, n_rows: int) -> None:
    given = [name for name in ("images", "parents", "source") if getattr(source, name) is not None]
    if given:
        raise ValueError(f"inputs.source.{given[0]}: the encoder's side is tokens alone")
    if source.causal not in (None, False):
        raise ValueError("inputs.source.causal: the encoder reads both ways; leave it out")
    if len(source.tokens) != n_rows:
        raise ValueError(f"inputs.source has {len(source.tokens)} rows, and inputs {n_rows}")


def _check_both_ways(specs: Sequence[LayerSpec], inputs: TransformerInput, cache: Remembered | None) -> None:
    """ValueError where tokens cannot see those behind them."""
    what = "bidirectional rows (causal=False)"
    if cache is not None:
        raise ValueError(f"{what} cannot continue a cache: what it remembers would have to see what comes later")
    if inputs.parents is not None:
        raise ValueError(f"{what} cannot have inputs.parents, from which documents go on without being seen")
    other = next((spec for spec in specs if spec.stateful), None)
    if other is not None:
        raise ValueError(
            f"{what} need attention in every layer; layer {other.index} is {other.mixer.name}, which keeps a state of "
            f"what came before"
        )


def _check(args: ModelArgs, inputs: TransformerInput, expert_counts: Tensor | None) -> None:
    inputs.check_tokens(args.vocab_size if args.input_dim is None else None)
    check_features(args, inputs)
    if inputs.source is not None and not args.encoder_layers:
        raise ValueError("inputs.source is given, but the model has no encoder (model.encoder_layers)")
    if inputs.images is not None and args.vision is None:
        raise ValueError("inputs.images are given, but the model has no vision tower (model.vision)")
    if expert_counts is not None and expert_counts.shape != routing_shape(args):
        raise ValueError(
            f"expert counts must have shape {routing_shape(args)} (MoE layers, experts); "
            f"got {tuple(expert_counts.shape)}"
        )
