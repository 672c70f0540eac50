"""One layer of the model, as its LayerSpec says: attention and feed-forward around the residual stream.

Shapes: B batch, T tokens, S source tokens, D model width.
"""

from torch import Tensor, nn

from llm.args import LayerSpec, ModelArgs
from llm.datatypes import RouterStats
from llm.layers.attention import Attention
from llm.layers.context import Context
from llm.layers.dropout import Dropout, dropout_at
from llm.layers.feed_forwards import FFNS
from llm.layers.foreign_names import accept_foreign_names
from llm.layers.mixers import MIXERS
from llm.layers.norm import make_norm, norm_rows
from llm.layers.parameter import Rows, under


class Block(nn.Module):
    """One layer: h = x + mixer(norm(x)); y = h + feed_forward(norm(h)), with the norms where the spec says; in parallel
    y = x + mixer(norm(x)) + feed_forward(other_norm(x)); of sums h = norm(x + mixer(x)); y = norm(h + feed_forward(h)).
    The mixer is called `attention`, whatever it is; a layer may be a feed-forward alone. A decoder's layer has cross
    attention to a memory between the two, with norms as theirs.
    """

    def __init__(self, args: ModelArgs, spec: LayerSpec) -> None:
        super().__init__()
        self.spec = spec
        foreign = "encoder.layers.{k}." if spec.encoder else "layers.{i}."
        accept_foreign_names(self, args, foreign)
        before, after = spec.norms.before, spec.norms.after
        place = spec.unit
        if spec.mixes:
            self.attention_norm = make_norm(args, args.dim) if before else None
            self.attention = MIXERS[spec.mixer.name](args, spec)
            accept_foreign_names(self.attention, args, f"{foreign}attention.")
            self.attention_post_norm = make_norm(args, args.dim, args.post_norm_eps) if after else None
            self.attention_dropout = dropout_at(args.resid_dropout, "residual", f"{place}.attention")
        self.ffn_dropout = dropout_at(args.resid_dropout, "residual", f"{place}.feed_forward")
        if spec.cross:
            self.cross_norm = make_norm(args, args.dim) if before else None
            self.cross = Attention(args, spec, cross=True)
            accept_foreign_names(self.cross, args, f"{foreign}cross.")
            self.cross_post_norm = make_norm(args, args.dim, args.post_norm_eps) if after else None
            self.cross_dropout = dropout_at(args.resid_dropout, "residual", f"{place}.cross")
        if spec.ffn != "none":
            self.ffn_norm = make_norm(args, args.dim) if before else None
            self.feed_forward = FFNS[spec.ffn].build(args, spec)
            accept_foreign_names(self.feed_forward, args, f"{foreign}feed_forward.")
            self.ffn_post_norm = make_norm(args, args.dim, args.post_norm_eps) if after else None

    @staticmethod
    def declare(args: ModelArgs, spec: LayerSpec) -> Rows:
        """What the parameters are: see llm/layers/parameter.py."""
        norm, mixer, feed_forward = norm_rows(args, args.dim), MIXERS[spec.mixer.name], FFNS[spec.ffn]
        rows: Rows = {}
        if spec.mixes:
            rows |= under("attention_norm", norm) if spec.norms.before else {}
            rows |= under("attention", mixer.declare(args, spec))
            rows |= under("attention_post_norm", norm) if spec.norms.after else {}
        if spec.cross:
            rows |= under("cross_norm", norm) if spec.norms.before else {}
            rows |= under("cross", Attention.declare(args, spec, cross=True))
            rows |= under("cross_post_norm", norm) if spec.norms.after else {}
        if spec.ffn == "none":
            return rows
        rows |= under("ffn_norm", norm) if spec.norms.before else {}
        rows |= under("feed_forward", feed_forward.declare(args))
        return rows | (under("ffn_post_norm", norm) if spec.norms.after else {})

    def forward(
        self, x_BTD: Tensor, ctx: Context, memory_BSD: Tensor | None = None
    ) -> tuple[Tensor, RouterStats | None]:
        """memory: for cross attention; None where the layer has none, or remembers what it needs of it."""
        h_BTD = x_BTD
        if self.spec.mixes:
            update_BTD = self.attention(_through(self.attention_norm, x_BTD), ctx)
            h_BTD = self._joined(x_BTD, update_BTD, self.attention_post_norm, self.attention_dropout, ctx)
        if self.spec.cross:
            update_BTD = self.cross(_through(self.cross_norm, h_BTD), ctx, memory_BSD)
            h_BTD = self._joined(h_BTD, update_BTD, self.cross_post_norm, self.cross_dropout, ctx)
        if self.spec.ffn == "none":
            return h_BTD, None
        normed_BTD, stats = _through(self.ffn_norm, x_BTD if self.spec.parallel else h_BTD), None
        if self.spec.ffn == "moe":
            y_BTD, stats = self.feed_forward(normed_BTD, ctx)
        else:
            y_BTD = self.feed_forward(normed_BTD, ctx)
        return self._joined(h_BTD, y_BTD, self.ffn_post_norm, self.ffn_dropout, ctx), stats

    def _joined(
        self, x_BTD: Tensor, update_BTD: Tensor, norm: nn.Module | None, dropout: Dropout | None, ctx: Context
    ) -> Tensor:
        """The residual stream with what is added to it."""
        if self.spec.norms.of_sum:
            return _through(norm, x_BTD + _kept(dropout, update_BTD, ctx))
        return x_BTD + _kept(dropout, _through(norm, update_BTD), ctx)


def _through(norm: nn.Module | None, x: Tensor) -> Tensor:
    normed: Tensor = x if norm is None else norm(x)
    return normed


def _kept(dropout: Dropout | None, update: Tensor, ctx: Context) -> Tensor:
    """What dropout leaves of what is added to the residual stream."""
    return update if dropout is None else dropout(update, ctx.residual_keys_n)
