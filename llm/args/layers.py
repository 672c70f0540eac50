"""One layer of a model, resolved, and the pattern grammar that says how layers differ.

    mixer[@stride][:flag...][+ffn]        attn:chunk:nope+moe
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NoReturn

Mask = Literal["full", "chunk", "window"]
Ffn = Literal["dense", "moe", "none"]
QKNorm = Literal["l2", "head", "full"]

PATTERN_ALIASES = {"alternating": ["ssm", "attn"]}
MIXERS = ("attn", "ssm", "routed", "none")
FLAGS = {"full": "mask", "chunk": "mask", "window": "mask", "rope": "rope", "nope": "rope"}
FFNS: tuple[Ffn, ...] = ("dense", "moe", "none")


@dataclass(frozen=True)
class LayerSpec:
    """One layer, fully resolved."""

    index: int
    mixer: str
    stride: int
    mask: Mask
    span: int | None  # length of a chunk or window
    scale: float | None  # factor on attention scores; None = 1 / sqrt(width of a head)
    softcap: float | None  # of attention scores
    rope: bool
    qk_norm: QKNorm | None
    temperature: bool
    ffn: Ffn


def parse_item(item: str) -> tuple[str, int, dict[str, str], Ffn | None]:
    """Split `mixer[@stride][:flag...][+ffn]`; flags come back as {"mask": ..., "rope": ...}, as far as written."""
    head, plus, ffn_text = item.partition("+")
    ffn = next((known for known in FFNS if known == ffn_text), None)
    if plus and ffn is None:
        refuse(item, f"unknown feed-forward +{ffn_text}; use {either(FFNS)}")
    mixer_text, *flag_texts = head.split(":")
    mixer, at, stride_text = mixer_text.partition("@")
    if mixer not in MIXERS:
        refuse(
            item, f"unknown mixer {mixer!r}; the grammar is mixer[@stride][:flag...][+ffn], mixers {either(MIXERS)}"
        )
    if at and not (stride_text.isdecimal() and int(stride_text) > 0):
        refuse(item, f"stride @{stride_text} must be a positive whole number")
    flags: dict[str, str] = {}
    for flag in flag_texts:
        if flag not in FLAGS:
            refuse(item, f"unknown flag :{flag}; use {either(FLAGS)}")
        if FLAGS[flag] in flags:
            refuse(item, f"flags :{flags[FLAGS[flag]]} and :{flag} exclude each other")
        flags[FLAGS[flag]] = flag
    return mixer, int(stride_text) if at else 1, flags, ffn


def refuse(item: str, reason: str) -> NoReturn:
    """ValueError naming the item of the pattern."""
    raise ValueError(f"model.layer_pattern item {item!r}: {reason}")


def either(options: Iterable[object]) -> str:
    """`a, b or c`."""
    *most, last = map(str, options)
    return f"{', '.join(most)} or {last}" if most else last
