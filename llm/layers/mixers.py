"""The kinds of mixer that a layer can have, by their names in the layer pattern; what a new one must do."""

from typing import Protocol

from torch import Tensor, nn

from llm.args import LayerSpec, ModelArgs
from llm.args.layers import MIXERS, NO_MIXER, STRIDED_ATTENTION, LayerItem, MixerSpec, resolve_nothing
from llm.layers.attention import Attention
from llm.layers.context import Context
from llm.layers.parameter import Rows
from llm.layers.region import InRegion
from llm.layers.routed import Routed
from llm.layers.ssm import SSM
from llm.layers.strided_attention import StridedAttention
from llm.layers.summed import Summed


class Mixer(Protocol):
    """A class of modules that mix the tokens of a layer: what the table of mixers holds.

    The class is asked what a layer is, from ModelArgs alone; the module then does it, on one device or on a part of the
    heads or channels of each rank. It derives from nn.Module and from llm.layers.region.InRegion.
    """

    @staticmethod
    def resolve(args: ModelArgs, item: LayerItem) -> MixerSpec:
        """What an item of the layer pattern means: its flags are the mixer's. ValueError by llm.args.layers.refuse."""

    @staticmethod
    def declare(args: ModelArgs, spec: LayerSpec) -> Rows:
        """What the parameters are, in the order of the module's own; the whole of llm/layers/parameter.py."""

    @staticmethod
    def flops(args: ModelArgs, spec: LayerSpec, seq_len: int) -> int:
        """Floating-point operations of a token of a sequence, forward and backward, beside 6 for each weight."""

    def __init__(self, args: ModelArgs, spec: LayerSpec) -> None: ...

    def forward(self, x_BTD: Tensor, ctx: Context) -> Tensor:
        """What is added to the residual stream: begins with region.enter(x, ctx.cut_sequence), whose result may be
        (B * T, D), and ends with region.leave(y, ctx.cut_sequence). A mixer that remembers earlier tokens keeps that in
        ctx.states, which is None unless rows are being continued.
        """


def register(name: str, mixer: type[nn.Module]) -> None:
    """Let layer patterns name a mixer. Raises ValueError where the name is taken, TypeError where a part is missing."""
    missing = [part for part in ("resolve", "declare", "flops", "take_share") if not hasattr(mixer, part)]
    if missing:
        raise TypeError(f"mixer {name!r}: {mixer.__name__} has no {', '.join(missing)}; see llm.layers.mixers.Mixer")
    MIXERS.register(name, mixer)


class NoMixer(nn.Module, InRegion):
    """Of layers that are a feed-forward alone: their block has no mixer, and no norm of one."""

    resolve = staticmethod(resolve_nothing)

    @staticmethod
    def declare(args: ModelArgs, spec: LayerSpec) -> Rows:
        return {}

    @staticmethod
    def flops(args: ModelArgs, spec: LayerSpec, seq_len: int) -> int:
        return 0


register("attn", Attention)
register("ssm", SSM)
register(STRIDED_ATTENTION, StridedAttention)
register("routed", Routed)
register("sum", Summed)
register(NO_MIXER, NoMixer)
