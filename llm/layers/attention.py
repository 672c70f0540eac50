"""Grouped-query self-attention (Ainslie et al. 2023, arXiv:2305.13245) with the additions of Llama 4.

On RoPE layers queries and keys are rotated and then, with qk_norm, RMS-normalised without weights. On NoPE layers with
temperature tuning, queries at position p are multiplied by 1 + attn_scale ln(1 + floor((p + 1) / floor_scale)).

Shapes: B batch, T tokens, D model width, H query heads, K kv heads, d head width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llm.args import LayerSpec, ModelArgs
from llm.layers.linear import Linear
from llm.layers.norm import rms_normalise
from llm.layers.opaque import opaque
from llm.layers.plan import Attend
from llm.layers.rope import inverse_frequencies, rotate, rotation


@dataclass(frozen=True)
class Context:
    """What all layers of one forward share; made once from the positions."""

    rotation_BT1m: Tensor | None
    """complex64, for RoPE layers."""
    temperature_BT11: Tensor | None
    """float32, for layers with temperature tuning."""
    plan: Attend
    """Attention over the batch itself, or over a cache."""

    @classmethod
    def build(cls, args: ModelArgs, specs: tuple[LayerSpec, ...], positions_BT: Tensor, plan: Attend) -> "Context":
        """positions_BT: int64, (1, T) where all rows agree, on the device of the layers."""
        frequency = inverse_frequencies(args.head_width, args.rope_theta, args.rope_scaling)
        return cls(
            rotation_BT1m=rotation(positions_BT, frequency) if any(spec.rope for spec in specs) else None,
            temperature_BT11=temperature(args, positions_BT) if any(spec.temperature for spec in specs) else None,
            plan=plan,
        )


def temperature(args: ModelArgs, positions_BT: Tensor) -> Tensor:
    """Factor on the queries of each position, float32 (B, T, 1, 1); 1 below floor_scale - 1."""
    steps_BT = (positions_BT.clamp(min=0) + 1) // args.floor_scale
    return (1 + args.attn_scale * torch.log1p(steps_BT.float()))[..., None, None]


class Attention(nn.Module):
    """Self-attention of one layer, told by its LayerSpec what to do."""

    def __init__(self, args: ModelArgs, spec: LayerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.head_dim = args.head_width
        self.norm_eps = args.norm_eps
        self.interleaved = args.rope_interleaved
        self.wq = Linear(args.dim, args.n_heads * args.head_width)
        self.wk = Linear(args.dim, args.kv_heads * args.head_width)
        self.wv = Linear(args.dim, args.kv_heads * args.head_width)
        self.wo = Linear(args.n_heads * args.head_width, args.dim)

    def forward(self, x_BTD: Tensor, ctx: Context) -> Tensor:
        q, k, v = (w(x_BTD).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        if self.spec.rope:
            assert ctx.rotation_BT1m is not None
            q, k = (rotate(x, ctx.rotation_BT1m, self.interleaved) for x in (q, k))
        if self.spec.qk_norm:
            q, k = (rms_normalise(x, self.norm_eps) for x in (q, k))
        if self.spec.temperature:
            q = (q * ctx.temperature_BT11).to(q.dtype)
        return self.wo(attend(ctx.plan, self.spec, q, k, v).flatten(-2))


@opaque
def attend(plan: Attend, spec: LayerSpec, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor) -> Tensor:
    """plan.attend, whose operations follow the documents of a batch."""
    return plan.attend(spec, q_BTHd, k_BTKd, v_BTKd)
