"""Miniformer's layers by name: attention, feed-forward, encoder layer, to call, to subclass and to give to a model.

Each is the model's own class of that part. Beside it only the way it is made and called is new: of a TransformerConfig,
and with states alone, which are then whole rows without padding, from position 0.

Shapes: B rows, T tokens of a row, D model width.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn

from llm.args import LayerSpec, ModelArgs
from llm.contexts import make_context
from llm.datatypes import RouterStats, TransformerInput
from llm.init import initialise
from llm.layers.attention import Attention
from llm.layers.block import Block
from llm.layers.context import Context
from llm.layers.dropout import dropout_at, keys_or_drawn
from llm.layers.ffn import FeedForward as DenseFeedForward
from llm.layers.ffn import feed_forward_rows
from llm.layers.parameter import Rows
from llm.siblings.miniformer_config import TransformerConfig


class _Part(nn.Module):
    """What the three have in common."""

    config: TransformerConfig
    layer_spec: LayerSpec

    @classmethod
    def of_layer(cls, args: ModelArgs, spec: LayerSpec) -> Self:
        """The part of one layer of a model; `cls(config, spec)`."""
        return cls(TransformerConfig.of(args), spec)

    def _begin(self, config: TransformerConfig, spec: LayerSpec, rows: Rows) -> None:
        """Initial values, drawn by a seed that torch's generator gives."""
        self.config, self.layer_spec = config, spec
        seed = int(torch.randint(1 << 31, (), device="cpu"))
        initialise(self, {name: row.init for name, row in rows.items()}, seed)

    def _context(self, x_BTD: Tensor, ctx: Context | None) -> Context:
        """What the layers of a forward share; of these rows alone where nothing is given."""
        if ctx is not None:
            return ctx
        args = self.config.args()
        tokens = torch.zeros(x_BTD.shape[:2], dtype=torch.int64, device=x_BTD.device)
        keys_N = keys_or_drawn(None, tokens, self.training and args.drops)
        given = TransformerInput(tokens, causal=self.config.is_causal)
        return make_context(args, (self.layer_spec,), given, None, None, keys_N, False, False)


class MultiHeadAttention(Attention, _Part):
    """Self-attention of a layer."""

    def __init__(self, config: TransformerConfig, spec: LayerSpec | None = None) -> None:
        """spec: of one layer of a model; None = of the first."""
        args, spec = _of(config, spec)
        super().__init__(args, spec)
        self._begin(config, spec, self.declare(args, spec))

    def forward(self, x_BTD: Tensor, ctx: Context | None = None) -> Tensor:
        """What it makes of states (B, T, D), before the sum with them. ctx: what the layers of a forward share."""
        return super().forward(x_BTD, self._context(x_BTD, ctx))


class FeedForward(DenseFeedForward, _Part):
    """Feed-forward of a layer: w2(act(w1 x)), or with swiglu w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: TransformerConfig, spec: LayerSpec | None = None) -> None:
        """spec: of one layer of a model; None = of the first."""
        args, spec = _of(config, spec)
        dropout = dropout_at(args.ffn_dropout, "hidden", f"layers.{spec.index}.feed_forward")
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
        args, spec = _of(config, spec)
        super().__init__(args, spec)
        self._begin(config, spec, self.declare(args, spec))

    def forward(self, x_BTD: Tensor, ctx: Context | None = None) -> Tensor:  # type: ignore[override]  # __call__ mends it
        """States (B, T, D) of states. ctx: what the layers of a forward share."""
        y_BTD, self._stats = super().forward(x_BTD, self._context(x_BTD, ctx))
        return y_BTD

    def __call__(self, x_BTD: Tensor, ctx: Context | None = None, *more: Any) -> Any:
        """`forward`; for a model, which gives a context, with what its experts report."""
        y_BTD = super().__call__(x_BTD, ctx, *more)
        stats, self._stats = self._stats, None
        return y_BTD if ctx is None else (y_BTD, stats)


def _of(config: TransformerConfig, spec: LayerSpec | None) -> tuple[ModelArgs, LayerSpec]:
    args = config.args()
    return args, args.layer_specs()[0] if spec is None else spec
