"""The one table from parameter names to how a parameter is treated: slicing, checkpoints, weight decay and initial
values read it.

Shapes: experts.w1, w3 (E, D, F), experts.w2 (E, F, D), every other matrix (out, in).
"""

import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["matrix", "expert", "norm", "router", "embedding", "head", "bias"]


@dataclass(frozen=True)
class ParamPlan:
    """How one parameter is treated."""

    kind: Kind
    tp_dim: int | None
    """Dimension that tensor parallelism cuts (llm/boxes.py has the exceptions); None = whole on every rank."""
    ep_dim: int | None
    """Dimension that expert parallelism cuts."""
    decay: bool
    """Whether weight decay applies."""
    in_region: bool = True
    """Whether it is used inside a tensor-parallel region, so that a rank makes one term of its gradient."""


_COLUMN = ParamPlan("matrix", tp_dim=0, ep_dim=None, decay=True)
_ROW = ParamPlan("matrix", tp_dim=1, ep_dim=None, decay=True)
_NORM = ParamPlan("norm", tp_dim=None, ep_dim=None, decay=False, in_region=False)
_CUT_BIAS = ParamPlan("bias", tp_dim=0, ep_dim=None, decay=False)
_WHOLE_BIAS = ParamPlan("bias", tp_dim=None, ep_dim=None, decay=False)

PLANS: tuple[tuple[str, ParamPlan], ...] = (
    (r"tok_embeddings\.weight", ParamPlan("embedding", tp_dim=0, ep_dim=None, decay=False)),
    (r"output\.weight", ParamPlan("head", tp_dim=0, ep_dim=None, decay=True)),
    (r"norm\.(weight|bias)", _NORM),
    (r"layers\.\d+\.(attention|ffn)(_post)?_norm\.(weight|bias)", _NORM),
    (r"layers\.\d+\.attention\.w[qkv]\.weight", _COLUMN),
    (r"layers\.\d+\.attention\.wo\.weight", _ROW),
    (r"layers\.\d+\.attention\.w[qkv]\.bias", _CUT_BIAS),
    (r"layers\.\d+\.attention\.wo\.bias", _WHOLE_BIAS),
    (r"layers\.\d+\.attention\.[qk]_norm\.(weight|bias)", ParamPlan("norm", tp_dim=0, ep_dim=None, decay=False)),
    (r"layers\.\d+\.feed_forward\.(shared_expert\.)?w[13]\.weight", _COLUMN),
    (r"layers\.\d+\.feed_forward\.(shared_expert\.)?w2\.weight", _ROW),
    (r"layers\.\d+\.feed_forward\.w[13]\.bias", _CUT_BIAS),
    (r"layers\.\d+\.feed_forward\.w2\.bias", _WHOLE_BIAS),
    (r"layers\.\d+\.feed_forward\.router\.weight", ParamPlan("router", tp_dim=None, ep_dim=None, decay=False)),
    (r"layers\.\d+\.feed_forward\.experts\.w[13]", ParamPlan("expert", tp_dim=2, ep_dim=0, decay=True)),
    (r"layers\.\d+\.feed_forward\.experts\.w2", ParamPlan("expert", tp_dim=1, ep_dim=0, decay=True)),
)


def plan_for(name: str) -> ParamPlan:
    """The row of the table for a canonical parameter name. Raises KeyError naming the parameter when there is none."""
    for pattern, plan in PLANS:
        if re.fullmatch(pattern, name):
            return plan
    raise KeyError(f"parameter {name!r} matches no row of llm/plans.py; add one that says how it is cut and decayed")


def cut_dimension(name: str) -> int | None:
    """The dimension along which tensor parallelism cuts a parameter; None = it does not, or no row is about it."""
    return next((plan.tp_dim for pattern, plan in PLANS if re.fullmatch(pattern, name)), None)
