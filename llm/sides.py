"""The two sides of an encoder-decoder in a model: what its units hand on, and its encoder by itself.

Between units there is one tensor, the residual streams of both sides one after the other, (N + M, D) with the N tokens
of the target first: so whatever cuts a model between units carries one tensor, whatever the model is.

Shapes: B rows, T tokens and S source tokens of a row, N = B * T, M = B * S, D model width. With sequence parallelism
each rank has a part of each side: n of N, m of M.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from llm.args import LayerSpec, ModelArgs
from llm.datatypes import RouterStats, TransformerInput
from llm.layers.context import Context
from llm.layers.encoder import ENCODER_NORM, Encoder, encoder_units
from llm.layers.region import InRegion


class Sides(InRegion):
    """Methods of LLM about the encoder's side of a forward."""

    encoder: Encoder
    encoder_specs: tuple[LayerSpec, ...]
    args: ModelArgs
    context: Callable[..., Context]
    embed_source: Callable[..., Tensor]
    _through: Callable[..., tuple[Tensor, RouterStats | None]]

    def encode(self, source: TransformerInput | Tensor) -> Tensor:
        """What the encoder makes of a batch of sources, (B, S, D): the memory that `forward` takes, with the same
        `inputs.source`, or without it where each row is one document without padding. A tensor is tokens, or values of
        a model that reads them. ValueError where the model has no encoder.
        """
        source = TransformerInput.of(source) if isinstance(source, Tensor) else source
        if not self.encoder_specs:
            raise ValueError("model.encoder_layers=0: the model has no encoder")
        # every document of the source stands for one of a target, which nothing reads
        target = replace(source, source=source)
        ctx = self.context(target)
        memory = self.embed_source(target, ctx)
        for unit in encoder_units(self.args):
            memory, _ = self.encoded(unit, memory, ctx)
        cut = ctx.source is not None and ctx.source.cut_sequence
        return self.region.enter(memory, cut).view(*source.tokens.shape, -1) if cut else memory

    def source_flows(self, units: Sequence[str], ctx: Context, memory: Tensor | None) -> bool:
        """Whether the source's stream passes these units beside the target's: not where its memory is there already,
        nor behind the norm."""
        return ctx.source is not None and memory is None and units[0] != "output"

    def encoded(self, unit: str, memory: Tensor | None, ctx: Context) -> tuple[Tensor, RouterStats | None]:
        """What a unit of the encoder makes of the source's stream."""
        assert ctx.source is not None and memory is not None
        if unit != ENCODER_NORM:
            return self._through(unit, memory, ctx.source)
        norm: nn.Module | None = self.encoder.norm
        return (memory if norm is None else norm(memory)), None

    def taken(self, memory: Tensor | None, ctx: Context) -> Tensor | None:
        """A memory (B, S, D) that the caller gave, as this rank's layers take it; None where none is given."""
        if memory is None:
            return None
        if ctx.source is None or memory.shape[:2] != ctx.source.shape:
            of = "without an encoder" if ctx.source is None else f"whose tokens are {ctx.source.shape}"
            raise ValueError(f"memory {tuple(memory.shape)} is not of inputs.source, {of}")
        return self.region.own(memory.flatten(0, 1)) if ctx.source.cut_sequence else memory

    def with_source(self, inputs: TransformerInput, memory: Tensor | None) -> TransformerInput:
        """The inputs of a forward with this memory: without a source, each of its rows is one document."""
        if memory is None or inputs.source is not None:
            return inputs
        tokens, width = memory.new_zeros(memory.shape[:2], dtype=torch.int64), self.args.input_dim
        features = None if width is None else memory.new_zeros(*tokens.shape, width)
        return replace(inputs, source=TransformerInput(tokens, features=features))

    def cuts_sides(self, inputs: TransformerInput) -> bool:
        """Whether each rank has the residual streams of its own tokens only, of both sides."""
        sides = [inputs.tokens] if inputs.source is None else [inputs.tokens, inputs.source.tokens]
        return all([self.region.cuts(tokens.numel()) for tokens in sides])

    def with_own_keys(self, ctx: Context) -> Context:
        """The context of a forward whose tokens are cut, with the keys of this rank's."""
        source = None if ctx.source is None else self.with_own_keys(ctx.source)
        own = None if ctx.keys_N is None else self.region.own(ctx.keys_N)
        return replace(ctx, residual_keys_n=own, source=source)


def together(target: Tensor, memory: Tensor | None) -> Tensor:
    """What is handed on between units: (B, T, D) and (B, S, D), or (n, D) and (m, D), as (n + m, D)."""
    assert memory is not None
    dim = target.shape[-1]
    return torch.cat([target.reshape(-1, dim), memory.reshape(-1, dim)])


def apart(both: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
    """The two sides again, in the form of the blocks of a forward with this context."""
    assert ctx.source is not None
    (rows, length), (_, source_length) = ctx.shape, ctx.source.shape
    first = len(both) * length // (length + source_length)
    target, memory = both.split([first, len(both) - first])
    if ctx.cut_sequence:
        return target, memory
    return target.view(rows, length, -1), memory.view(rows, source_length, -1)
