"""The kinds of feed-forward that a layer can have, by their names in the layer pattern."""

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from llm.args import Ffn, LayerSpec, ModelArgs
from llm.layers.ffn import build_feed_forward, feed_forward_rows
from llm.layers.moe import build_moe, moe_rows
from llm.layers.parameter import Rows


class FeedForwardKind(NamedTuple):
    """How a kind of feed-forward is made."""

    build: Callable[[ModelArgs, LayerSpec], nn.Module]
    declare: Callable[[ModelArgs], Rows]
    """What its parameters are: see llm/layers/parameter.py."""


FEED_FORWARDS: dict[Ffn, FeedForwardKind] = {
    "dense": FeedForwardKind(build_feed_forward, feed_forward_rows),
    "moe": FeedForwardKind(build_moe, moe_rows),
    "none": FeedForwardKind(lambda *_: nn.Identity(), lambda _: {}),
}
