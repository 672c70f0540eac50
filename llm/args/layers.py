"""One layer of a model, resolved, and the pattern grammar that says how layers differ.

    mixer[@stride][:flag...][+ffn]        attn:chunk:nope+moe

What mixes tokens, what follows it, its activation and how positions are known are named by tables: MIXERS, FFNS,
ACTIVATIONS, POSITIONS. The modules of llm/layers fill them, and extensions add to them (docs/extend/).
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Protocol

from llm.args.registry import Registry

if TYPE_CHECKING:
    from llm.args.model import ModelArgs

Mask = Literal["full", "chunk", "window"]
QKNorm = Literal["l2", "plain", "head", "full"]

PATTERN_ALIASES = {"alternating": ["ssm", "attn"]}
NO_MIXER = "none"
"""The mixer of a layer that is a feed-forward alone."""
FLAGS = {"full": "mask", "chunk": "mask", "window": "mask", "rope": "rope", "nope": "rope"}


@dataclass(frozen=True)
class LayerItem:
    """An item of the pattern as written, and which layer it is about."""

    text: str
    index: int
    mixer: str
    stride: int
    flags: tuple[str, ...]
    ffn: str | None


@dataclass(frozen=True)
class MixerSpec:
    """What a layer mixes its tokens with; a kind of mixer adds fields of its own."""

    name: str
    """In MIXERS."""


@dataclass(frozen=True)
class StridedSpec(MixerSpec):
    """What builds its state from one vector for each `stride` tokens."""

    stride: int


@dataclass(frozen=True)
class AttentionSpec(MixerSpec):
    """Self-attention."""

    mask: Mask
    span: int | None  # length of a chunk or window
    scale: float | None  # factor on attention scores; None = 1 / sqrt(width of a head)
    softcap: float | None  # of attention scores
    rope: bool
    qk_norm: QKNorm | None
    temperature: bool
    gate: bool = False  # of what it makes of the values


@dataclass(frozen=True)
class StridedAttentionSpec(StridedSpec):
    """Attention to one vector for each `stride` tokens."""

    each: AttentionSpec


@dataclass(frozen=True)
class RoutedSpec(MixerSpec):
    """A state-space mixer for all tokens, and attention for some."""

    each: AttentionSpec


@dataclass(frozen=True)
class SumSpec(MixerSpec):
    """A state-space mixer and attention, both for all tokens."""

    each: AttentionSpec


@dataclass(frozen=True)
class NormsSpec:
    """Where a layer has norms, around the mixer and around the feed-forward alike."""

    before: bool
    after: bool
    of_sum: bool = False
    """Whether those after normalise the sum, and not what is added."""


@dataclass(frozen=True)
class LayerSpec:
    """One layer, fully resolved."""

    index: int
    mixer: MixerSpec
    ffn: str
    """In FFNS."""
    norms: NormsSpec
    parallel: bool
    """Mixer and feed-forward read the same x."""
    cross: bool = False
    """Whether its tokens attend to a memory, what an encoder made, between mixer and feed-forward."""
    encoder: bool = False
    """Whether it is one of the encoder's."""

    @property
    def unit(self) -> str:
        """What the model calls it, and which unit of it it is: `layers.0`, or `encoder.layers.0`."""
        return f"{'encoder.' * self.encoder}layers.{self.index}"

    @property
    def attention(self) -> AttentionSpec | None:
        """Of a layer whose mixer is attention."""
        return self.mixer if isinstance(self.mixer, AttentionSpec) else None

    @property
    def heads(self) -> AttentionSpec | None:
        """How queries and keys are made, also where the mixer attends to something else than its tokens."""
        return self.mixer.each if isinstance(self.mixer, StridedAttentionSpec | RoutedSpec) else self.attends

    @property
    def attends(self) -> AttentionSpec | None:
        """How each token attends to those that it sees, where it does, beside a state too."""
        return self.mixer.each if isinstance(self.mixer, SumSpec) else self.attention

    @property
    def mixes(self) -> bool:
        """Whether it has a mixer; else it is a feed-forward alone."""
        return self.mixer.name != NO_MIXER

    @property
    def stateful(self) -> bool:
        """Whether it keeps a state of what came before, beside keys and values of each token."""
        return self.mixes and self.attention is None

    @property
    def stride(self) -> int:
        """Tokens for each vector that the mixer's state is built from."""
        return self.mixer.stride if isinstance(self.mixer, StridedSpec) else 1

    @property
    def kind(self) -> "LayerSpec":
        """The same for all layers that differ in nothing but their place."""
        return replace(self, index=0)


def attention_specs(specs: Iterable[LayerSpec]) -> list[AttentionSpec]:
    """Of those layers in which each token attends."""
    return [spec.attends for spec in specs if spec.attends is not None]


class MixerType(Protocol):
    """What a table of mixers holds: the module's class. llm/layers/mixers.py says what it must do."""

    def resolve(self, args: "ModelArgs", item: LayerItem) -> MixerSpec:
        """What an item of the pattern means. Raises ValueError through `refuse`."""


MIXERS: Registry[Any] = Registry("mixer", "llm.layers.mixers")
"""Classes: llm/layers/mixers.py."""
FFNS: Registry[Any] = Registry("feed-forward", "llm.layers.feed_forwards")
"""Each a FeedForwardKind: llm/layers/feed_forwards.py."""
ACTIVATIONS: Registry[Any] = Registry("activation", "llm.layers.activations")
"""Functions of a tensor: llm/layers/activations.py."""
POSITIONS: Registry[Any] = Registry("kind of position", "llm.layers.positions")
"""Each a PositionKind: llm/layers/positions.py."""


def parse_item(text: str, index: int) -> LayerItem:
    """Split an item of the pattern; flags are the mixer's to read."""
    head, plus, ffn_text = text.partition("+")
    ffn = ffn_text if plus else None
    if ffn is not None and ffn not in FFNS:
        refuse(text, f"unknown feed-forward +{ffn_text}; use {either(FFNS)}")
    mixer_text, *flags = head.split(":")
    mixer, at, stride_text = mixer_text.partition("@")
    if mixer not in MIXERS:
        known = [name for name in MIXERS if name != STRIDED_ATTENTION]
        refuse(
            text, f"unknown mixer {mixer!r}; the grammar is mixer[@stride][:flag...][+ffn], mixers {either(known)}"
        )
    if at and not (stride_text.isdecimal() and int(stride_text) > 0):
        refuse(text, f"stride @{stride_text} must be a positive whole number")
    return LayerItem(text, index, mixer, int(stride_text) if at else 1, tuple(flags), ffn)


STRIDED_ATTENTION = "strided_attn"
"""In MIXERS; in patterns it is `attn@STRIDE`."""


def resolve_attention(args: "ModelArgs", item: LayerItem) -> AttentionSpec | StridedAttentionSpec:
    """An attention layer: its flags, and where they say nothing the rules of Llama 4."""
    if item.stride > 1 and {"chunk", "window"} & set(item.flags):
        refuse(item.text, "a layer with a stride sees all chunks before; leave out :chunk and :window")
    spec = _each_token(args, item)
    if item.stride == 1:
        return spec
    return StridedAttentionSpec(STRIDED_ATTENTION, item.stride, replace(spec, mask="full", span=None))


def resolve_routed(args: "ModelArgs", item: LayerItem) -> RoutedSpec:
    """A routed layer, whose flags are those of its attention."""
    if item.stride != 1:
        refuse(item.text, "a routed layer has no stride")
    if {"chunk", "window"} & set(item.flags):
        refuse(item.text, "tokens that attend see all before that do; leave out :chunk and :window")
    for key in ("ssm", "route"):
        if getattr(args, key) is None:
            refuse(item.text, f"routed needs the group model.{key}; {{}} takes its defaults")
    return RoutedSpec(item.mixer, replace(_each_token(args, item), mask="full", span=None))


def resolve_sum(args: "ModelArgs", item: LayerItem) -> SumSpec:
    """A layer with a state and attention, whose flags are those of its attention."""
    if item.stride != 1:
        refuse(item.text, "a sum of a state and attention has no stride")
    if args.ssm is None:
        refuse(item.text, "sum needs the group model.ssm; {} takes its defaults")
    return SumSpec(item.mixer, _each_token(args, item))


def resolve_nothing(args: "ModelArgs", item: LayerItem) -> MixerSpec:
    """A layer that is a feed-forward alone."""
    if item.stride != 1 or item.flags:
        refuse(item.text, "a layer without a mixer has no stride and no flags")
    if item.ffn == "none":
        refuse(item.text, "a layer is a mixer, a feed-forward or both")
    return MixerSpec(NO_MIXER)


def _each_token(args: "ModelArgs", item: LayerItem) -> AttentionSpec:
    flags: dict[str, str] = {}
    for flag in item.flags:
        if flag not in FLAGS:
            refuse(item.text, f"unknown flag :{flag}; use {either(FLAGS)}")
        if FLAGS[flag] in flags:
            refuse(item.text, f"flags :{flags[FLAGS[flag]]} and :{flag} exclude each other")
        flags[FLAGS[flag]] = flag
    interval = args.nope_layer_interval
    if flags.get("rope") == "rope" and not POSITIONS[args.pos].rotates:
        refuse(item.text, f":rope needs model.pos=rope; got {args.pos}")
    local = flags["rope"] == "rope" if "rope" in flags else not (interval and (item.index + 1) % interval == 0)
    rope = local and POSITIONS[args.pos].rotates
    spans: dict[Mask, int | None] = {
        "full": None, "chunk": args.attention_chunk_size, "window": args.sliding_window
    }  # fmt: skip
    mask = _mask_by_rule(args, local) if "mask" not in flags else next(m for m in spans if m == flags["mask"])
    if mask != "full" and spans[mask] is None:
        refuse(item.text, f"{mask} needs model.{'attention_chunk_size' if mask == 'chunk' else 'sliding_window'}")
    return AttentionSpec(
        name=item.mixer,
        mask=mask,
        span=spans[mask],
        scale=args.score_scale,
        softcap=args.attn_softcap,
        rope=rope,
        qk_norm=args.qk_norm if rope or args.qk_norm != "l2" else None,
        temperature=args.attn_temperature_tuning and not rope,
        gate=args.attn_gate,
    )


def cross_attention(args: "ModelArgs") -> AttentionSpec:
    """Attention to a memory: to all of it, whatever the layer's own tokens see of each other, without RoPE, as the
    positions of two texts are not comparable, and so without what depends on it.
    """
    return AttentionSpec(
        name="cross",
        mask="full",
        span=None,
        scale=args.score_scale,
        softcap=args.attn_softcap,
        rope=False,
        qk_norm=None if args.qk_norm == "l2" else args.qk_norm,
        temperature=False,
        gate=args.attn_gate,
    )


def _mask_by_rule(args: "ModelArgs", local: bool) -> Mask:
    """Of a layer whose pattern does not say. local: it is none of those without RoPE among others that have it."""
    if args.attention_chunk_size:
        return "chunk" if local else "full"
    return "window" if args.sliding_window else "full"


def refuse(item: str, reason: str) -> NoReturn:
    """ValueError naming the item of the pattern."""
    raise ValueError(f"model.layer_pattern item {item!r}: {reason}")


def either(options: Iterable[object]) -> str:
    """`a, b or c`."""
    *most, last = map(str, options)
    return f"{', '.join(most)} or {last}" if most else last
