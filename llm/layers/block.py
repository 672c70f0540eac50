"""One layer of the model, told by its LayerSpec what it is: attention and feed-forward around the residual stream.

Shapes: B batch, T tokens, D model width.
"""

from torch import Tensor, nn

from llm.args import LayerSpec, ModelArgs
from llm.datatypes import RouterStats
from llm.foreign.load import register_hook
from llm.layers.attention import Attention
from llm.layers.context import Context
from llm.layers.ffn import build_feed_forward
from llm.layers.moe import build_moe
from llm.layers.norm import make_norm


class Block(nn.Module):
    """One layer: h = x + attention(norm(x)); y = h + feed_forward(norm(h)), with the norms where args.norm_place says;
    with parallel_residual y = x + attention(norm(x)) + feed_forward(other_norm(x)).
    """

    def __init__(self, args: ModelArgs, spec: LayerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.parallel = args.parallel_residual
        register_hook(self, args, "layers.{i}.")
        before, after = args.norm_place != "post", args.norm_place != "pre"
        self.attention_norm = make_norm(args, args.dim) if before else None
        self.attention = Attention(args, spec)
        register_hook(self.attention, args, "layers.{i}.attention.")
        self.attention_post_norm = make_norm(args, args.dim) if after else None
        if spec.ffn != "none":
            self.ffn_norm = make_norm(args, args.dim) if before else None
            self.feed_forward = build_moe(args, spec) if spec.ffn == "moe" else build_feed_forward(args)
            register_hook(self.feed_forward, args, "layers.{i}.feed_forward.")
            self.ffn_post_norm = make_norm(args, args.dim) if after else None

    def forward(self, x_BTD: Tensor, ctx: Context) -> tuple[Tensor, RouterStats | None]:
        update_BTD = self.attention(_through(self.attention_norm, x_BTD), ctx)
        h_BTD = x_BTD + _through(self.attention_post_norm, update_BTD)
        if self.spec.ffn == "none":
            return h_BTD, None
        normed_BTD, stats = _through(self.ffn_norm, x_BTD if self.parallel else h_BTD), None
        if self.spec.ffn == "moe":
            y_BTD, stats = self.feed_forward(normed_BTD, ctx)
        else:
            y_BTD = self.feed_forward(normed_BTD, ctx)
        return h_BTD + _through(self.ffn_post_norm, y_BTD), stats


def _through(norm: nn.Module | None, x: Tensor) -> Tensor:
    normed: Tensor = x if norm is None else norm(x)
    return normed
