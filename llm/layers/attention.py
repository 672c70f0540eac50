"""Grouped-query self-attention (Ainslie et al. 2023, arXiv:2305.13245) with the additions of Llama 4 and others.

On RoPE layers queries and keys are rotated. qk_norm RMS-normalises them: "l2" each head without weights, after that
(Llama 4); before it, "head" each head with one weight for all (Qwen 3), and "full" all heads of a token as one (OLMo
2). Scores are scaled, and capped where attn_softcap says so (Gemma 2). On NoPE layers with temperature tuning, queries
at position p are multiplied by 1 + attn_scale ln(1 + floor((p + 1) / floor_scale)).

Shapes: B batch, T tokens, D model width, H query heads, K kv heads, d head width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llm.args import LayerSpec, ModelArgs
from llm.layers.linear import Linear
from llm.layers.norm import HeadsNorm, make_norm, rms_normalise
from llm.layers.opaque import opaque
from llm.layers.plan import Attend
from llm.layers.region import WHOLE, Region
from llm.layers.rope import amplitude, dynamic_frequencies, inverse_frequencies, rotate, rotation


@dataclass(frozen=True)
class Context:
    """What all layers of one forward share; made once from the positions."""

    rotation_BT1m: Tensor | None
    """complex64, for RoPE layers."""
    temperature_BT11: Tensor | None
    """float32, for layers with temperature tuning."""
    plan: Attend
    """Attention over the batch itself, or over a cache."""
    shape: tuple[int, int]
    """Rows B and tokens T of the batch."""
    valid_BT: Tensor | None = None
    """bool: false for padding; None where there is none."""

    @classmethod
    def build(
        cls,
        args: ModelArgs,
        specs: tuple[LayerSpec, ...],
        positions_BT: Tensor,
        plan: Attend,
        shape: tuple[int, int],
        lengths_BT: Tensor | None = None,
        valid_BT: Tensor | None = None,
    ) -> "Context":
        """positions_BT: int64, (1, T) where all rows agree, on the device of the layers. lengths_BT: positions of each
        token's document, for frequencies that depend on them."""
        width, theta, scaling = args.rotated_width, args.rope_theta, args.rope_scaling
        frequency = inverse_frequencies(width, theta, scaling)
        if scaling is not None and lengths_BT is not None:
            frequency = dynamic_frequencies(lengths_BT, width, theta, scaling)
        rope = any(spec.rope for spec in specs)
        return cls(
            rotation_BT1m=rotation(positions_BT, frequency, amplitude(scaling)) if rope else None,
            temperature_BT11=temperature(args, positions_BT) if any(spec.temperature for spec in specs) else None,
            plan=plan,
            shape=shape,
            valid_BT=valid_BT,
        )


def temperature(args: ModelArgs, positions_BT: Tensor) -> Tensor:
    """Factor on the queries of each position, float32 (B, T, 1, 1); 1 below floor_scale - 1."""
    steps_BT = (positions_BT.clamp(min=0) + 1) // args.floor_scale
    return (1 + args.attn_scale * torch.log1p(steps_BT.float()))[..., None, None]


class Attention(nn.Module):
    """Self-attention of one layer, told by its LayerSpec what to do."""

    region: Region = WHOLE

    def __init__(self, args: ModelArgs, spec: LayerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.head_dim = args.head_width
        self.norm_eps = args.norm_eps
        self.interleaved = args.rope_interleaved
        self.wq = Linear(args.dim, args.n_heads * args.head_width, args.qkv_bias)
        self.wk = Linear(args.dim, args.kv_heads * args.head_width, args.qkv_bias)
        self.wv = Linear(args.dim, args.kv_heads * args.head_width, args.qkv_bias)
        self.wo = Linear(args.n_heads * args.head_width, args.dim, args.o_bias)
        self.q_norm, self.k_norm = (head_norm(args, spec, heads) for heads in (args.n_heads, args.kv_heads))

    def forward(self, x_BTD: Tensor, ctx: Context) -> Tensor:
        x = self.region.enter(x_BTD)
        if x.ndim == 2:
            x = x.unflatten(0, ctx.shape)
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.spec.rope:
            assert ctx.rotation_BT1m is not None
            q, k = (rotate(y, ctx.rotation_BT1m, self.interleaved) for y in (q, k))
        if self.spec.qk_norm == "l2":
            q, k = (rms_normalise(y, self.norm_eps) for y in (q, k))
        if self.spec.temperature:
            q = (q * ctx.temperature_BT11).to(q.dtype)
        return self.region.leave(self.wo(attend(ctx.plan, self.spec, q, k, v).flatten(-2)))


def head_norm(args: ModelArgs, spec: LayerSpec, n_heads: int) -> nn.Module | None:
    """The norm with weights of so many heads (..., H, d), where the layer has one."""
    if spec.qk_norm == "head":
        return make_norm(args, args.head_width)
    if spec.qk_norm == "full":
        return HeadsNorm(n_heads * args.head_width, args.norm_eps, args.norm_offset)
    return None


@opaque
def attend(plan: Attend, spec: LayerSpec, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor) -> Tensor:
    """plan.attend, whose operations follow the documents of a batch."""
    return plan.attend(spec, q_BTHd, k_BTKd, v_BTKd)
