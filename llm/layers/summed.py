"""A state-space mixer and attention side by side, both for all tokens, whose results are added (Falcon-H1; Zuo et al.
2025, arXiv:2507.22448): what routed layers with combine = add are where every token attends.

Shapes: B rows, T tokens, D model width.
"""

from torch import Tensor, nn

from llm.args import LayerSpec, ModelArgs
from llm.args.layers import resolve_sum
from llm.args.sum import SumArgs
from llm.layers.attention import Attention
from llm.layers.context import Context
from llm.layers.parameter import Rows, under
from llm.layers.region import InRegion
from llm.layers.ssm import SSM


class Summed(nn.Module, InRegion):
    """The mixer `sum` of layer patterns. Both parts are in one tensor-parallel region, which is crossed once."""

    resolve = staticmethod(resolve_sum)

    def __init__(self, args: ModelArgs, spec: LayerSpec) -> None:
        super().__init__()
        scales = SumArgs() if args.sum is None else args.sum
        self.of_ssm, self.of_attn = scales.ssm, scales.attn
        self.ssm, self.attn = SSM(args, spec), Attention(args, spec)

    @staticmethod
    def declare(args: ModelArgs, spec: LayerSpec) -> Rows:
        """What the parameters are: see llm/layers/parameter.py."""
        return under("ssm", SSM.declare(args, spec)) | under("attn", Attention.declare(args, spec))

    @staticmethod
    def flops(args: ModelArgs, spec: LayerSpec, seq_len: int) -> int:
        return SSM.flops(args, spec, seq_len) + Attention.flops(args, spec, seq_len)

    def forward(self, x_BTD: Tensor, ctx: Context) -> Tensor:
        u = self.region.enter(x_BTD, ctx.cut_sequence)
        u = u.unflatten(0, ctx.shape) if u.ndim == 2 else u
        said = self.ssm.inside(_times(u, self.of_ssm[0]), ctx)
        attended = self.attn.inside(_times(u, self.of_attn[0]), ctx)
        return self.region.leave(
            _times(said, self.of_ssm[1]) + _times(attended, self.of_attn[1]), ctx.cut_sequence
        )


def _times(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x * factor
