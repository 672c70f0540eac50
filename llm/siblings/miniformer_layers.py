"""Miniformer's layers by name: attention, feed-forward, encoder and decoder layer, to call, to subclass and to give to
a model.

Each is the model's own class of that part. Beside it only the way it is made and called is new: of a TransformerConfig,
and with states alone, which are then whole rows without padding, from position 0. What a model gives beside the config
is its own business: a subclass hands it on, as `def __init__(self, config, *place): super().__init__(config, *place)`.

Shapes: B rows, T tokens of a row, S of its source, D model width.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn

from llm.args import LayerSpec, ModelArgs
from llm.contexts import make_contexts
from llm.datatypes import RouterStats, TransformerInput
from llm.init import initialise
from llm.layers.attention import Attention
from llm.layers.block import Block
from llm.layers.context import Context
from llm.layers.dropout import dropout_at, keys_or_drawn
from llm.layers.ffn import FeedForward as DenseFeedForward
from llm.layers.ffn import feed_forward_rows
from llm.layers.parameter import Rows
from llm.siblings.miniformer_config import EncoderDecoderConfig, TransformerConfig, config_of


class _Part(nn.Module):
    """What they have in common."""

    config: TransformerConfig
    layer_spec: LayerSpec

    @classmethod
    def of_layer(cls, args: ModelArgs, spec: LayerSpec, cross: bool = False) -> Self:
        """The part of one layer of a model."""
        place = (spec, True) if cross else (spec,)
        return cls(config_of(args), *place)

    def _begin(self, config: TransformerConfig, spec: LayerSpec, rows: Rows) -> None:
        """Initial values, drawn by a seed that torch's generator gives."""
        self.config, self.layer_spec = config, spec
        seed = int(torch.randint(1 << 31, (), device="cpu"))
        initialise(self, {name: row.init for name, row in rows.items()}, seed)

    def _context(self, x_BTD: Tensor, ctx: Context | None, memory_BSD: Tensor | None = None) -> Context:
        """What the layers of a forward share; of these rows alone where nothing is given."""
        if ctx is not None:
            return ctx
        args = self.config.args()
        source = None if memory_BSD is None else TransformerInput(_tokens(memory_BSD))
        given = TransformerInput(_tokens(x_BTD), causal=self.config.is_causal, source=source)
        keys_N = keys_or_drawn(None, given.tokens, self.training and args.drops)
        encoders = () if source is None else args.encoder_specs()
        return make_contexts(args, (self.layer_spec,), encoders, given, None, None, keys_N, False, False)


class MultiHeadAttention(Attention, _Part):
    """Self-attention of a layer, or a decoder's attention to the encoder."""

    def __init__(self, config: TransformerConfig, spec: LayerSpec | None = None, cross: bool = False) -> None:
        """spec: of one layer of a model; None = of the first. cross: attention to a memory."""
        config, args, spec = _of(config, spec, cross)
        super().__init__(args, spec, cross)
        self._begin(config, spec, self.declare(args, spec, cross))

    def forward(self, x_BTD: Tensor, ctx: Context | None = None, memory_BSD: Tensor | None = None) -> Tensor:
        """What it makes of states (B, T, D), before the sum with them. ctx: what the layers of a forward share. memory:
        what the encoder made, of attention to it."""
        return super().forward(x_BTD, self._context(x_BTD, ctx, memory_BSD), memory_BSD)


class FeedForward(DenseFeedForward, _Part):
    """Feed-forward of a layer: w2(act(w1 x)), or with swiglu w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: TransformerConfig, spec: LayerSpec | None = None) -> None:
        """spec: of one layer of a model; None = of the first."""
        config, args, spec = _of(config, spec)
        dropout = dropout_at(args.ffn_dropout, "hidden", f"{spec.unit}.feed_forward")
        super().__init__(args.dim, args.ffn_width(), args.act, args.gated, args.ffn_bias, args.lora, dropout)
        self._begin(config, spec, feed_forward_rows(args))

    def forward(self, x: Tensor, ctx: Context | None = None) -> Tensor:
        """What it makes of states (B, T, D), before the sum with them. ctx: what the layers of a forward share."""
        return super().forward(x, self._context(x, ctx))


class EncoderLayer(Block, _Part):
    """A layer: self-attention and feed-forward around the residual stream."""

    _stats: RouterStats | None = None

    def __init__(self, config: TransformerConfig, spec: LayerSpec | None = None) -> None:
        """spec: of one layer of a model; None = of the first."""
        config, args, spec = _of(config, spec)
        super().__init__(args, spec)
        self._begin(config, spec, self.declare(args, spec))

    def forward(self, x_BTD: Tensor, ctx: Context | None = None) -> Tensor:  # type: ignore[override]  # __call__ mends it
        """States (B, T, D) of states. ctx: what the layers of a forward share."""
        y_BTD, self._stats = super().forward(x_BTD, self._context(x_BTD, ctx))
        return y_BTD

    def __call__(self, x_BTD: Tensor, ctx: Context | None = None) -> Any:
        """`forward`; for a model, which gives a context, with what its experts report."""
        y_BTD = super().__call__(x_BTD, ctx)
        return y_BTD if ctx is None else (y_BTD, _taken(self))


class DecoderLayer(Block, _Part):
    """A layer of a decoder: self-attention, attention to what the encoder made, feed-forward."""

    _stats: RouterStats | None = None

    def __init__(self, config: TransformerConfig, spec: LayerSpec | None = None) -> None:
        """spec: of one layer of a model; None = of the decoder's first."""
        config, args, spec = _of(config, spec, cross=True)
        super().__init__(args, spec)
        self._begin(config, spec, self.declare(args, spec))

    def forward(  # type: ignore[override]  # __call__ mends it
        self, x_BTD: Tensor, memory_BSD: Tensor | None = None, ctx: Context | None = None
    ) -> Tensor:
        """States (B, T, D) of states, and of what the encoder made (B, S, D), which a cache may remember. ctx: what the
        layers of a forward share."""
        y_BTD, self._stats = super().forward(x_BTD, self._context(x_BTD, ctx, memory_BSD), memory_BSD)
        return y_BTD

    def __call__(self, x_BTD: Tensor, *given: Any) -> Any:
        """`forward`; for a model, which gives a context before the memory, with what its experts report."""
        if not given or not isinstance(given[0], Context):
            return super().__call__(x_BTD, *given)
        ctx, memory_BSD = given[0], given[1] if len(given) > 1 else None
        return super().__call__(x_BTD, memory_BSD, ctx), _taken(self)


def _taken(layer: EncoderLayer | DecoderLayer) -> RouterStats | None:
    """What the experts of a layer reported in this call."""
    stats, layer._stats = layer._stats, None
    return stats


def _tokens(x_BTD: Tensor) -> Tensor:
    """Token ids in the place of those that the states are of."""
    return torch.zeros(x_BTD.shape[:2], dtype=torch.int64, device=x_BTD.device)


def _of(
    config: TransformerConfig, spec: LayerSpec | None, cross: bool = False
) -> tuple[TransformerConfig, ModelArgs, LayerSpec]:
    """Config, model and layer of a part."""
    if cross and spec is None:
        config = EncoderDecoderConfig.like(config)
    args = config.args()
    return config, args, args.layer_specs()[0] if spec is None else spec
