"""The kinds of feed-forward that a layer can have, by their names in the layer pattern; what a new one must do."""

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from llm.args import LayerSpec, ModelArgs
from llm.args.layers import FFNS
from llm.layers.ffn import build_feed_forward, feed_forward_rows
from llm.layers.moe import build_moe, moe_rows
from llm.layers.parameter import Rows


class FeedForwardKind(NamedTuple):
    """How a kind of feed-forward is made."""

    build: Callable[[ModelArgs, LayerSpec], nn.Module]
    """A module and llm.layers.region.InRegion, called with (x, ctx): it begins with region.enter(x, ctx.cut_sequence),
    whose result may be (B * T, D), and ends with region.leave(y, ctx.cut_sequence)."""
    declare: Callable[[ModelArgs], Rows]
    """What its parameters are: see llm/layers/parameter.py. A token meets each of them in a product, for the count of
    its operations, but for the share that a row says."""


def register(name: str, kind: FeedForwardKind) -> None:
    """Let layer patterns name a feed-forward. Raises ValueError where the name is taken."""
    FFNS.register(name, kind)


register("dense", FeedForwardKind(build_feed_forward, feed_forward_rows))
register("moe", FeedForwardKind(build_moe, moe_rows))
register("none", FeedForwardKind(lambda *_: nn.Identity(), lambda _: {}))
