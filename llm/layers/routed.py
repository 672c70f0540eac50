"""A state-space mixer for all tokens, and attention for some: those whose score is above a threshold that follows the
scores of training, so that about a given share attends.

Of the normed input u, token t has the score r_t = w u_t / |w|, and wants to attend where r_t is above the threshold
tau. It does while its document's budget lasts (llm/kernels/budget.py). Tokens that attend see those before them that
do, at their own positions, and themselves. What attention says counts by the gate sigmoid(r_t - tau), through which w
learns; it is added to what the state says, or with combine = select stands in its place. Whether a token attends
depends on it and on those before it alone, so training, prompts and decoding compute the same.

Thresholds are constant in a step. Training counts scores in bins, over all rows and ranks, and moves each threshold
once after the step: `moved`.

Shapes: B rows, T tokens, L tokens of a row that attend at most, D model width, H query heads, K kv heads, d head width.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from llm.args import LayerSpec, ModelArgs
from llm.args.layers import resolve_routed
from llm.args.route import RouteArgs
from llm.datatypes import BINS, RouteCounts
from llm.init import Normal
from llm.kernels.budget import passed
from llm.kernels.chunks import attend_packed
from llm.kernels.dtypes import wide_dtype
from llm.kernels.graph_breaks import graph_break
from llm.kernels.rotate import Turns
from llm.layers.attention import Attention
from llm.layers.context import Context
from llm.layers.masks import scores_of
from llm.layers.parameter import ParamInfo, Rows, under
from llm.layers.region import InRegion
from llm.layers.ssm import SSM
from llm.layers.strides import at_chunks

REACH = 32.0
"""Scores from -REACH to REACH are counted in bins of one width; those beyond, in the last ones."""


def moved(threshold: float | None, counts: RouteCounts, route: RouteArgs) -> float | None:
    """A threshold after a step with these counts: what lies between `rate` of the scores and the others has its share
    in it; of the first step, all. threshold: None before the first. The sums are whole numbers, so it is the same
    however rows and ranks were cut."""
    found = counts.scores.cumsum(0)
    total = found[-1].item()
    if not total:
        return threshold
    wanted = (1 - route.rate) * total
    place = int(torch.searchsorted(found, wanted).clamp(max=BINS - 1))
    below = found[place - 1].item() if place else 0.0
    inside = found[place].item() - below
    quantile = -REACH + 2 * REACH / BINS * (place + (wanted - below) / max(inside, 1.0))
    return quantile if threshold is None else route.ema * threshold + (1 - route.ema) * quantile


@dataclass
class RoutedKeys:
    """What a layer's attention remembers of some rows: keys and values of the tokens that attended."""

    count_B: Tensor
    """int64: how many of each row."""
    keys_BSKd: Tensor
    values_BSKd: Tensor

    @property
    def nbytes(self) -> int:
        return self.count_B.nbytes + self.keys_BSKd.nbytes + self.values_BSKd.nbytes

    def reorder(self, rows: Tensor) -> None:
        rows = rows.to(self.count_B.device)
        self.count_B = self.count_B.index_select(0, rows)
        self.keys_BSKd = self.keys_BSKd.index_select(0, rows)
        self.values_BSKd = self.values_BSKd.index_select(0, rows)

    def put(self, k_BLKd: Tensor, v_BLKd: Tensor, there_BL: Tensor) -> None:
        """Add the keys and values of the tokens that are there, which come first in each row. It waits for the device,
        as room is taken for no more than there are."""
        added_B = there_BL.sum(1)
        room = int((self.count_B + added_B).max()) - self.keys_BSKd.shape[1]
        rows, columns = there_BL.nonzero(as_tuple=True)
        places = rows, self.count_B[rows] + columns
        for name, new in (("keys_BSKd", k_BLKd), ("values_BSKd", v_BLKd)):
            kept = getattr(self, name)
            if room > 0:
                kept = torch.cat([kept, kept.new_zeros(len(kept), room, *kept.shape[2:])], dim=1)
            kept[places] = new[rows, columns]
            setattr(self, name, kept)
        self.count_B = self.count_B + added_B


class Route(nn.Module):
    """The vector that scores tokens."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, u_BTD: Tensor) -> Tensor:
        """Scores (B, T), float32: the router's length does not count, so that a threshold can follow them."""
        wide = wide_dtype(u_BTD)
        w = self.weight.to(wide)
        return u_BTD.to(wide) @ (w / torch.linalg.vector_norm(w))


class TakenAttention(Attention):
    """Attention of tokens that were taken out of their rows."""

    def none(self, u: Tensor) -> RoutedKeys:
        """What is remembered of rows without a token."""
        heads = len(self.wk.weight) if self.wk.rows is None else self.wk.rows.stop - self.wk.rows.start
        nothing = u.new_zeros(len(u), 0, heads // self.head_dim, self.head_dim)
        return RoutedKeys(torch.zeros(len(u), dtype=torch.int64, device=u.device), nothing, nothing)

    def of_taken(
        self, u_BLD: Tensor, columns_BL: Tensor, there_BL: Tensor, remembered: RoutedKeys | None, ctx: Context
    ) -> Tensor:
        """(B, L, D), a term of the sum over ranks. columns: places of these tokens in their rows."""
        keys_N = None if ctx.keys_N is None else at_chunks(ctx.keys_N.view(ctx.shape), columns_BL).flatten()
        q, k, v = (w(u_BLD, keys_N).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        rotation = ctx.rotation_BT1m
        assert not isinstance(rotation, Turns)
        rotation = None if rotation is None else at_chunks(rotation, columns_BL)
        q, k = (self._placed(y, norm, rotation) for y, norm in ((q, self.q_norm), (k, self.k_norm)))
        made = self._attended_taken(q, k, v, columns_BL, there_BL, remembered, ctx).flatten(-2)
        if self.wg is not None:
            made = made * self.wg(u_BLD, keys_N).sigmoid()
        out: Tensor = self.wo(made, keys_N)
        return out

    def _attended_taken(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        columns_BL: Tensor,
        there_BL: Tensor,
        remembered: RoutedKeys | None,
        ctx: Context,
    ) -> Tensor:
        before_B, all_k, all_v = None, k, v
        if remembered is not None:
            before_B = remembered.count_B
            all_k, all_v = torch.cat([remembered.keys_BSKd, k], 1), torch.cat([remembered.values_BSKd, v], 1)
            remembered.put(k, v, there_BL)
        documents = None if ctx.documents_BT is None else at_chunks(ctx.documents_BT, columns_BL)
        lost = None
        if ctx.attention_dropout is not None:
            lost = ctx.attention_dropout.of_layer(self.layer)
            lost = replace(lost, keys=at_chunks(lost.keys, columns_BL))
        return attend_packed(q, all_k, all_v, documents, there_BL, before_B, scores_of(self.spec), lost)


class Routed(nn.Module, InRegion):
    """The mixer `routed` of layer patterns."""

    def __init__(self, args: ModelArgs, spec: LayerSpec) -> None:
        super().__init__()
        assert args.route is not None
        self.layer, self.adds = spec.index, args.route.combine == "add"
        self.ssm, self.attn = SSM(args, spec), TakenAttention(args, spec)
        self.route = Route(args.dim)

    resolve = staticmethod(resolve_routed)

    @staticmethod
    def declare(args: ModelArgs, spec: LayerSpec) -> Rows:
        """What the parameters are: see llm/layers/parameter.py."""
        assert args.route is not None
        attention = {
            name: replace(row, active=row.active * args.route.rate)
            for name, row in Attention.declare(args, spec).items()
        }
        rows = under("ssm", SSM.declare(args, spec)) | under("attn", attention)
        return rows | {"route.weight": ParamInfo((args.dim,), "bias", Normal(args.init_std))}

    @staticmethod
    def flops(args: ModelArgs, spec: LayerSpec, seq_len: int) -> int:
        assert args.route is not None
        scores = 12 * args.n_heads * args.head_width * seq_len * args.route.rate**2
        return SSM.flops(args, spec, seq_len) + round(scores)

    def forward(self, x_BTD: Tensor, ctx: Context) -> Tensor:
        said = self.ssm(x_BTD, ctx)
        u = self.region.enter(x_BTD, ctx.cut_sequence)
        u = u.unflatten(0, ctx.shape) if u.ndim == 2 else u
        made, attends_BT = self._attended(u, ctx)
        attended = self.region.leave(made, ctx.cut_sequence)
        if not self.adds:
            chosen = attends_BT.flatten()
            chosen = self.region.own(chosen)[:, None] if ctx.cut_sequence else chosen.view(*ctx.shape, 1)
            said = said.masked_fill(chosen, 0)
        return said + attended

    @graph_break  # how many tokens attend follows the batch
    def _attended(self, u: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """What attention adds to each token, (B, T, D), a term of the sum over ranks; and which tokens attend."""
        scores_BT = self.route(u)
        remembered = None
        if ctx.states is not None:  # not under the number of the layer, where the other mixer's state is
            remembered = ctx.states.state(~self.layer, lambda: self.attn.none(u))
        attends_BT, columns_BL, there_BL = self._chosen(scores_BT.detach(), remembered, ctx)
        gates_BL = at_chunks((scores_BT - self._threshold(ctx)).sigmoid(), columns_BL) * there_BL
        made = self.attn.of_taken(at_chunks(u, columns_BL), columns_BL, there_BL, remembered, ctx)
        made = made * gates_BL[..., None].to(u.dtype)
        spread = torch.zeros_like(u).scatter(1, columns_BL[..., None].expand_as(made), made.to(u.dtype))
        return spread, attends_BT

    def _threshold(self, ctx: Context) -> float:
        return ctx.thresholds.get(self.layer, 0.0)

    @torch.no_grad()
    def _chosen(
        self, scores_BT: Tensor, remembered: RoutedKeys | None, ctx: Context
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Which tokens attend, (B, T); their places in each row, (B, L), in order; which of these hold one."""
        assert ctx.budget is not None
        want_BT = scores_BT > self._threshold(ctx)
        if ctx.valid_BT is not None:
            want_BT = want_BT & ctx.valid_BT
        before_B = None if remembered is None else remembered.count_B
        attends_BT = passed(want_BT, ctx.budget.bounds_BT, ctx.documents_BT, before_B)
        if ctx.reports is not None:
            ctx.reports[self.layer] = self._counted(scores_BT, want_BT, attends_BT, ctx)
        columns_BL = (~attends_BT).to(torch.uint8).argsort(dim=1, stable=True)[:, : ctx.budget.most]
        return attends_BT, columns_BL, attends_BT.gather(1, columns_BL)

    def _counted(self, scores_BT: Tensor, want_BT: Tensor, attends_BT: Tensor, ctx: Context) -> RouteCounts:
        """Of this rank's share of the tokens, so that all count once."""
        valid_BT = torch.ones_like(want_BT) if ctx.valid_BT is None else ctx.valid_BT
        scores, want, attends, valid = (
            self.region.own(y.flatten()) for y in (scores_BT, want_BT, attends_BT, valid_BT)
        )
        bins = ((scores + REACH) * (BINS / (2 * REACH))).long().clamp(0, BINS - 1)
        counts = torch.zeros(BINS, dtype=torch.float64, device=scores.device).index_add_(0, bins, valid.double())
        gates = ((scores - self._threshold(ctx)).sigmoid().double() * attends).sum()
        return RouteCounts(torch.cat([counts, torch.stack([want.sum().double(), attends.sum().double(), gates])]))


def thresholds_of(args: ModelArgs) -> dict[int, float]:
    """Of routed layers, by their numbers, as far as they are known."""
    layers = [spec.index for spec in args.layer_specs() if spec.mixer.name == "routed"]
    known = () if args.route is None or args.route.thresholds is None else args.route.thresholds
    return dict(zip(layers, known, strict=True)) if known else {}
