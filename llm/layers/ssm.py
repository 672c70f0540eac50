"""State-space mixer: a recurrence whose state has one size however many tokens went before (Mamba-2; Dao and Gu 2024,
arXiv:2405.21060).

Of the normed input: channels x and a gate z, what is written to the state and read from it (B and C, shared by the
heads of a group), and a time step dt of each head. A short convolution goes over x, B and C; then head h keeps a state
S_t = exp(dt_t A_h) S_(t-1) + dt_t x_t B_t' and says S_t C_t + D_h x_t. That is multiplied with silu(z), normalised over
the channels of its group, and goes through wo. Recurrence, gate and norm are in float32.

Padding changes no state, and neither convolution nor state passes the border of a document.

With a stride s all but the gate is computed of one vector for s tokens (llm/layers/strides.py), and a token's gate
meets what was said of the last chunk that it sees; before the first chunk is complete, nothing is said.

Shapes: B rows, T tokens or chunks of tokens, D model width, I channels, H heads, P width of a head, G groups, N width
of the state, K taps.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.args import LayerSpec, ModelArgs
from llm.args.layers import LayerItem, MixerSpec, StridedSpec, refuse
from llm.args.lora import adapter
from llm.args.ssm import SSMArgs
from llm.init import Constant, InverseSoftplus, LogUniform, Uniform
from llm.kernels.dtypes import wide_dtype
from llm.kernels.fused_ssd import fused_ssd
from llm.kernels.graph_breaks import graph_break
from llm.kernels.short_conv import short_conv
from llm.kernels.ssd import ssd, ssd_step
from llm.layers.context import Context
from llm.layers.linear import Linear
from llm.layers.norm import GroupsNorm
from llm.layers.parameter import ParamInfo, Rows, under
from llm.layers.region import InRegion
from llm.layers.strides import Pool, at_chunks

LEAST_DECAY, MOST_DECAY = 1.0, 16.0
"""Between which -A begins, evenly."""
LEAST_STEP, MOST_STEP = 1e-3, 1e-1
"""Bounds of the initial time step where the input adds nothing; drawn evenly in its logarithm."""
SCANS = {"torch": ssd, "mamba_ssm": fused_ssd}
"""model.ssm.kernel -> what computes the recurrence over whole rows."""


@dataclass
class SSMState:
    """What a layer remembers of some rows."""

    history_x_BKC: Tensor
    """The last K - 1 tokens before the convolution."""
    history_bc_BKC: Tensor
    state_BHPN: Tensor

    @property
    def nbytes(self) -> int:
        return self.history_x_BKC.nbytes + self.history_bc_BKC.nbytes + self.state_BHPN.nbytes

    def reorder(self, rows: Tensor) -> None:
        rows = rows.to(self.state_BHPN.device)
        self.history_x_BKC = self.history_x_BKC.index_select(0, rows)
        self.history_bc_BKC = self.history_bc_BKC.index_select(0, rows)
        self.state_BHPN = self.state_BHPN.index_select(0, rows)


@dataclass
class StridedState:
    """What a layer with a stride remembers of some rows besides."""

    pending_BsD: Tensor
    """The last s - 1 tokens' vectors."""
    said_B1I: Tensor
    """What the recurrence said of the last chunk; 0 before the first."""
    ssm: SSMState

    @property
    def nbytes(self) -> int:
        return self.pending_BsD.nbytes + self.said_B1I.nbytes + self.ssm.nbytes

    def reorder(self, rows: Tensor) -> None:
        self.ssm.reorder(rows)
        rows = rows.to(self.said_B1I.device)
        self.pending_BsD = self.pending_BsD.index_select(0, rows)
        self.said_B1I = self.said_B1I.index_select(0, rows)


class Taps(nn.Module):
    """Weight (C, 1, K), as those of convolutions are, and bias (C,) of one of each channel by itself, with its SiLU."""

    def __init__(self, channels: int, taps: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, taps))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    @staticmethod
    def declare(channels: int, taps: int, bias: bool, cut: bool, grain: int) -> Rows:
        """cut: whether tensor parallelism cuts the channels, `grain` parts of which stay whole."""
        where = (0, grain) if cut else (None, None)
        init = Uniform(1 / math.sqrt(taps))
        rows = {"weight": ParamInfo((channels, 1, taps), "bias", init, *where)}
        return rows | ({"bias": ParamInfo((channels,), "bias", init, *where)} if bias else {})

    def forward(self, x_BTC: Tensor, documents_BT: Tensor | None, history_BKC: Tensor | None) -> Tensor:
        return short_conv(x_BTC, self.weight.squeeze(1), self.bias, documents_BT, history_BKC)


class SSM(nn.Module, InRegion):
    """The mixer `ssm` of layer patterns."""

    def __init__(self, args: ModelArgs, spec: LayerSpec) -> None:
        super().__init__()
        ssm, lora = of_model(args), args.lora
        inner, heads = widths(args)
        self.layer, self.stride = spec.index, spec.stride
        self.pool = Pool(spec.stride, args.dim) if spec.stride > 1 else None
        self.head_width, self.d_state, self.n_groups = ssm.head_width, ssm.d_state, ssm.groups
        self.groups: slice | None = None
        """Of B and C, those that this rank's heads read; None = all."""
        self.scan, self.chunk, self.dt_limit = SCANS[ssm.kernel], ssm.chunk, ssm.dt_limit
        self.wz = Linear(args.dim, inner, ssm.bias, adapter(lora, "wz"))
        self.wx = Linear(args.dim, inner, ssm.bias, adapter(lora, "wx"))
        self.wbc = Linear(args.dim, 2 * ssm.groups * ssm.d_state, ssm.bias, adapter(lora, "wbc"))
        self.wdt = Linear(args.dim, heads, ssm.bias, adapter(lora, "wdt"))
        self.conv_x = Taps(inner, ssm.d_conv, ssm.conv_bias)
        self.conv_bc = Taps(2 * ssm.groups * ssm.d_state, ssm.d_conv, ssm.conv_bias)
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.scales = ssm.scales
        self.norm = None if ssm.norm == "none" else GroupsNorm(inner, ssm.groups, args.norm_eps)
        self.norm_first = ssm.norm == "before_gate"
        self.wo = Linear(inner, args.dim, ssm.bias, adapter(lora, "wo"))

    @staticmethod
    def resolve(args: ModelArgs, item: LayerItem) -> MixerSpec:
        if item.flags:
            refuse(item.text, f"unknown flag :{item.flags[0]}; ssm has none")
        if args.ssm is None:
            refuse(item.text, "ssm needs the group model.ssm; {} takes its defaults")
        return StridedSpec(item.mixer, item.stride)

    @staticmethod
    def declare(args: ModelArgs, spec: LayerSpec) -> Rows:
        """What the parameters are: see llm/layers/parameter.py. Heads are cut whole; B and C, which are few rows, are
        whole on every rank.
        """
        ssm, lora = of_model(args), args.lora
        inner, heads = widths(args)
        shared, start = 2 * ssm.groups * ssm.d_state, Uniform(1 / math.sqrt(args.dim))
        rows: Rows = under("pool", Pool.declare(spec.stride, args.dim)) if spec.stride > 1 else {}
        for name, width, cut in (("wz", inner, 0), ("wx", inner, 0), ("wbc", shared, None), ("wdt", heads, 0)):
            grain, low_rank = heads if cut == 0 else None, adapter(lora, name)
            rows |= under(name, Linear.declare(args.dim, width, ssm.bias, start, cut, grain=grain, lora=low_rank))
        rows |= under("conv_x", Taps.declare(inner, ssm.d_conv, ssm.conv_bias, True, heads))
        rows |= under("conv_bc", Taps.declare(shared, ssm.d_conv, ssm.conv_bias, False, heads))
        rows["A_log"] = ParamInfo((heads,), "bias", LogUniform(LEAST_DECAY, MOST_DECAY), 0, heads)
        rows["D"] = ParamInfo((heads,), "bias", Constant(1.0), 0, heads)
        rows["dt_bias"] = ParamInfo((heads,), "bias", InverseSoftplus(LEAST_STEP, MOST_STEP), 0, heads)
        if ssm.norm != "none":
            rows["norm.weight"] = ParamInfo((inner,), "norm", Constant(1.0), 0, heads)
        branches = args.n_layers if spec.ffn == "none" else 2 * args.n_layers
        last = Uniform(1 / math.sqrt(inner * branches))
        rows |= under("wo", Linear.declare(inner, args.dim, ssm.bias, last, 1, grain=heads, lora=adapter(lora, "wo")))
        return rows

    @staticmethod
    def flops(args: ModelArgs, spec: LayerSpec, seq_len: int) -> int:
        """Of a token beyond those of the matrices: the products of the chunked recurrence, counted as if none lay ahead
        of a token in its chunk, and the taps.
        """
        ssm, (inner, _) = of_model(args), widths(args)
        chunk = min(ssm.chunk, seq_len)
        scores, read = ssm.groups * ssm.d_state * chunk, inner * chunk
        return 6 * (scores + read + 2 * inner * ssm.d_state) // spec.stride

    def take_share(self, rank: int, ranks: int) -> None:
        self.wo.adds_bias = rank == 0
        if self.n_groups >= ranks:
            each = self.n_groups // ranks
            self.groups = slice(rank * each, (rank + 1) * each)
        else:
            group = rank * self.n_groups // ranks
            self.groups = slice(group, group + 1)
        if self.norm is not None:
            self.norm.take_groups(max(1, self.n_groups // ranks), over_ranks=self.n_groups == 1 and ranks > 1)

    def forward(self, x_BTD: Tensor, ctx: Context) -> Tensor:
        u = self.region.enter(x_BTD, ctx.cut_sequence)
        u = u.unflatten(0, ctx.shape) if u.ndim == 2 else u
        return self.region.leave(self.inside(u, ctx), ctx.cut_sequence)

    def inside(self, u_BTD: Tensor, ctx: Context) -> Tensor:
        """The work between the edges of the region, for a layer that has entered it."""
        z = self.wz(u_BTD, ctx.keys_N)
        z = z if self.scales is None else z * self.scales[0]
        y = self._said(u_BTD, z, ctx) if self.pool is None else self._said_of_chunks(self.pool, u_BTD, z, ctx)
        y, gate = self.norm(y) if self.norm is not None and self.norm_first else y, F.silu(z.to(y.dtype))
        y = y * gate
        y = y if self.norm is None or self.norm_first else self.norm(y)
        return self.wo(y.to(z.dtype), ctx.keys_N)

    def _first(self, u: Tensor, keys_N: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """x, B with C, and dt before its bias, as the linear layers make them."""
        x, bc, dt = self.wx(u, keys_N), self.wbc(u, keys_N), self.wdt(u, keys_N)
        if self.scales is None:
            return x, bc, dt
        _, of_x, of_b, of_c, of_dt = self.scales
        b, c = bc.chunk(2, dim=-1)
        return x * of_x, torch.cat([b * of_b, c * of_c], dim=-1), dt * of_dt

    def _said(self, u_BTD: Tensor, z_BTI: Tensor, ctx: Context) -> Tensor:
        x, bc, dt = self._first(u_BTD, ctx.keys_N)
        remembered = None
        if ctx.states is not None:
            remembered = ctx.states.state(self.layer, lambda: self._new_state(z_BTI, u_BTD.dtype))
        return self._mixed(x, bc, dt, ctx.documents_BT, ctx.valid_BT, remembered)

    def _said_of_chunks(self, pool: Pool, u_BTD: Tensor, z_BTI: Tensor, ctx: Context) -> Tensor:
        """Of each token, what was said of the last chunk that it sees."""
        assert ctx.strides is not None
        chunks, remembered, stream = ctx.strides.of(self.stride), None, u_BTD
        before = z_BTI.new_zeros(len(z_BTI), 1, z_BTI.shape[-1], dtype=wide_dtype(z_BTI))
        if ctx.states is not None:
            pending = u_BTD.new_zeros(len(u_BTD), self.stride - 1, u_BTD.shape[-1])
            new = StridedState(pending, before, self._new_state(z_BTI, u_BTD.dtype))
            remembered = ctx.states.state(self.layer, lambda: new)
            stream = torch.cat([remembered.pending_BsD, u_BTD], dim=1)
            remembered.pending_BsD, before = at_chunks(stream, chunks.left_Bs), remembered.said_B1I
        pooled = pool(stream, chunks.tokens_BKs)
        keys = None if ctx.keys_N is None else at_chunks(ctx.keys_N.view(ctx.shape), chunks.ends_BK).flatten()
        x, bc, dt = self._first(pooled, keys)
        state = None if remembered is None else remembered.ssm
        said = self._mixed(x, bc, dt, chunks.documents_BK, chunks.there_BK, state)
        said = torch.cat([before, said], dim=1)
        if remembered is not None:
            count = chunks.tokens_BKs.new_full((len(u_BTD), 1), chunks.tokens_BKs.shape[1])
            count = count if chunks.there_BK is None else chunks.there_BK.sum(1, keepdim=True)
            remembered.said_B1I = at_chunks(said, count)
        return at_chunks(said, chunks.seen_BT + 1)

    @graph_break
    def _mixed(
        self,
        x_BTI: Tensor,
        bc_BTC: Tensor,
        dt_BTH: Tensor,
        documents: Tensor | None,
        valid: Tensor | None,
        remembered: SSMState | None,
    ) -> Tensor:
        """What the recurrence makes, (B, T, I), float32. What it does follows the documents of a batch."""
        wide = wide_dtype(x_BTI)
        dt_BTH = F.softplus(dt_BTH.to(wide) + self.dt_bias.to(wide)).clamp(*self.dt_limit)
        if valid is not None:
            x_BTI, bc_BTC = x_BTI * valid[..., None], bc_BTC * valid[..., None]
            dt_BTH = dt_BTH * valid[..., None]
        if remembered is None:
            x_BTI, bc_BTC = self.conv_x(x_BTI, documents, None), self.conv_bc(bc_BTC, documents, None)
        else:
            x_BTI, bc_BTC = self._continued(remembered, x_BTI, bc_BTC, valid)
        x = x_BTI.to(wide).unflatten(-1, (-1, self.head_width))
        b, c = bc_BTC.to(wide).unflatten(-1, (2, self.n_groups, self.d_state)).unbind(2)
        if self.groups is not None:
            b, c = b[:, :, self.groups], c[:, :, self.groups]
        a_H = -self.A_log.to(wide).exp()
        if remembered is None:
            y = self.scan(x, dt_BTH, a_H, b, c, documents, chunk=self.chunk).y_BTHP
        elif x.shape[1] == 1:
            made, remembered.state_BHPN = ssd_step(x[:, 0], dt_BTH[:, 0], a_H, b[:, 0], c[:, 0], remembered.state_BHPN)
            y = made[:, None]
        else:
            y, remembered.state_BHPN = self.scan(x, dt_BTH, a_H, b, c, None, remembered.state_BHPN, self.chunk)
        return (y + x * self.D.to(wide)[:, None]).flatten(-2)

    def _new_state(self, z_BTI: Tensor, dtype: torch.dtype) -> SSMState:
        """Of rows that have no token yet. z: of these rows. dtype: of what the linear layers make."""
        n_rows, taps, shared = len(z_BTI), self.conv_x.weight.shape[-1], self.conv_bc.weight.shape[0]
        x, bc = (z_BTI.new_zeros(n_rows, taps - 1, width, dtype=dtype) for width in (z_BTI.shape[-1], shared))
        shape = n_rows, len(self.A_log), self.head_width, self.d_state
        return SSMState(x, bc, z_BTI.new_zeros(shape, dtype=wide_dtype(z_BTI)))

    def _continued(
        self, remembered: SSMState, x_BTI: Tensor, bc_BTC: Tensor, valid_BT: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The convolutions of rows that go on, after which the last tokens of each row are remembered. Padding is moved
        before what is remembered, and its places come out as they may: it has no time step.
        """
        taps, length = self.conv_x.weight.shape[-1], x_BTI.shape[1]
        x_BLI = torch.cat([remembered.history_x_BKC, x_BTI], dim=1)
        bc_BLC = torch.cat([remembered.history_bc_BKC, bc_BTC], dim=1)
        back = None
        if valid_BT is not None:
            there = F.pad(valid_BT, (taps - 1, 0), value=True)
            order = there.to(torch.uint8).argsort(dim=1, stable=True)
            back = order.argsort(dim=1)[:, taps - 1 :, None]
            x_BLI, bc_BLC = (y.gather(1, order[..., None].expand_as(y)) for y in (x_BLI, bc_BLC))
        remembered.history_x_BKC, remembered.history_bc_BKC = x_BLI[:, length:].clone(), bc_BLC[:, length:].clone()
        if back is None:
            before_x, before_bc = x_BLI[:, : taps - 1], bc_BLC[:, : taps - 1]
            return self.conv_x(x_BTI, None, before_x), self.conv_bc(bc_BTC, None, before_bc)
        x_BLI, bc_BLC = self.conv_x(x_BLI, None, None), self.conv_bc(bc_BLC, None, None)
        return tuple(y.gather(1, back.expand(-1, -1, y.shape[-1])) for y in (x_BLI, bc_BLC))


def of_model(args: ModelArgs) -> SSMArgs:
    """Of a model that has such layers."""
    assert args.ssm is not None
    return args.ssm


def widths(args: ModelArgs) -> tuple[int, int]:
    """Channels and heads."""
    return of_model(args).widths(args.dim)
