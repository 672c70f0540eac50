"""Mixture of experts: a router sends each token to top_k SwiGLU experts, and a shared expert sees every token.

As in Llama 4 (github.com/meta-llama/llama-models) an expert's weight multiplies its input, or as in Mixtral
(arXiv:2401.04088) its output. Tokens are sorted by expert and each expert multiplies its own rows only; nothing is
detached, so the result and all gradients equal evaluating every expert on every token with the weights of the unchosen
set to 0. No token is dropped, unless experts have a capacity: see llm/layers/capacity.py.

Shapes: N tokens, D model width, E experts, F expert width, k experts a token, P = N*k (token, choice) pairs, R
dispatched rows, S rows that arrive at this rank's experts, e experts of a rank, r ranks.
"""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.args import LayerSpec, LoraArgs, ModelArgs, MoEArgs
from llm.args.lora import adapter
from llm.datatypes import RouterStats
from llm.kernels.dtypes import wide_dtype
from llm.kernels.graph_breaks import graph_break
from llm.kernels.grouped import Padding, adapted_swiglu, grouped_swiglu
from llm.kernels.grouped_ffn import grouped_feed_forward
from llm.kernels.keyed import with_numbers
from llm.layers.activations import ACTIVATIONS
from llm.layers.capacity import rejected
from llm.layers.context import Context
from llm.layers.dispatch import Dispatch
from llm.layers.dropout import Dropout, dropout_at, dropped
from llm.layers.ffn import FeedForward
from llm.layers.lora import LORA_A, LORA_B, stack_adapter_rows
from llm.layers.parameter import ZEROS, ParamInfo, Rows, under, weights
from llm.layers.region import Exchange, InRegion

EXPERT_WEIGHTS = ("w1", "w2", "w3")
"""Of the experts, in the order of their parameters."""
EXPERT_BIASES = ("b1", "b2", "b3")


class ExpertKind(NamedTuple):
    """What feed-forward an expert is."""

    act: str
    gated: bool
    bias: bool


SWIGLU = ExpertKind("silu", gated=True, bias=False)


class MoE(nn.Module, InRegion):
    """One MoE feed-forward layer."""

    exchange: Exchange | None = None
    """Set where the experts lie on several ranks."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        moe: MoEArgs,
        number: int = 0,
        lora: LoraArgs | None = None,
        dropouts: tuple[Dropout | None, Dropout | None, Dropout | None] = (None, None, None),
        kind: ExpertKind = SWIGLU,
    ) -> None:
        """number: which of the model's MoE layers this is. dropouts: of the hidden units of experts, shared expert and
        overflow expert. kind: of feed-forward that all of them are.
        """
        super().__init__()
        self.moe = moe
        self.number = number
        self.router = Router(dim, moe.n_experts)
        self.experts = Experts(moe.n_experts, dim, hidden, adapter(lora, "experts"), dropouts[0], kind)
        self.overflow_expert = FeedForward(dim, hidden, *kind, lora, dropouts[2]) if moe.overflow else None
        self.shared_expert = FeedForward(dim, hidden, *kind, lora, dropouts[1]) if moe.shared else None

    def forward(self, x_BTD: Tensor, ctx: Context) -> tuple[Tensor, RouterStats]:
        """Padding goes to experts as all else does, or to none if these have a capacity; it counts in no statistic."""
        x = self.region.enter(x_BTD, ctx.cut_sequence)
        x_ND = x.flatten(0, -2)
        valid_N = None if ctx.valid_BT is None else ctx.valid_BT.flatten()
        logits_NE = self.router(x_ND)
        weight_Nk, expert_Nk = route(logits_NE, self.moe)
        rejected_Nk = self.rejected(expert_Nk, valid_N, ctx)
        nowhere_Nk = rejected_Nk
        if rejected_Nk is not None and valid_N is not None:  # so no rank sends more than what experts can hold
            nowhere_Nk = rejected_Nk | ~valid_N[:, None]
        y_ND, counts_E = self.routed(x_ND, weight_Nk, expert_Nk, valid_N, ctx.keys_N, nowhere_Nk)
        previous_E = self.previous_counts(ctx.expert_counts, counts_E)
        if self.overflow_expert is not None:
            y_ND = y_ND + self.overflowed(x_ND, weight_Nk, rejected_Nk, ctx)
        y = y_ND.view_as(x)
        if self.shared_expert is not None:
            y = y + self.shared_expert.inside(x, ctx)
        own_valid = None if valid_N is None else self.region.own(valid_N)
        stats = self.statistics(self.region.own(logits_NE), counts_E, previous_E, own_valid)
        if self.moe.capacity is not None:
            n_rejected = counts_E.new_zeros(()) if rejected_Nk is None else self.region.own(rejected_Nk).sum()
            stats = stats._replace(rejected=n_rejected)
        return self.region.leave(y, ctx.cut_sequence), stats

    @property
    def bounded(self) -> bool:
        """Whether experts take no more than their capacity: in training, as dropout is on in a model."""
        return self.moe.capacity is not None and self.training and torch.is_grad_enabled()

    @graph_break
    def rejected(self, expert_Nk: Tensor, valid_N: Tensor | None, ctx: Context) -> Tensor | None:
        """Which assignments find their expert full, (N, k) bool; None where experts take all. Every rank of the region
        has all tokens of a row, and finds the same."""
        if not self.bounded:
            return None
        return rejected(expert_Nk, valid_N, ctx.shape, self.moe)

    @graph_break
    def overflowed(self, x_ND: Tensor, weight_Nk: Tensor, rejected_Nk: Tensor | None, ctx: Context) -> Tensor:
        """What the overflow expert makes of tokens with rejected assignments, by the sum of their weights; (N, D). With
        none of these it is computed all the same, on no row, as its parameters have a gradient on every rank."""
        assert self.overflow_expert is not None
        if rejected_Nk is None:
            rejected_Nk = torch.zeros_like(weight_Nk, dtype=torch.bool)
            token_n = torch.arange(0, device=x_ND.device)
        else:
            token_n = rejected_Nk.any(1).nonzero().flatten()
        weight_n1 = weight_Nk.masked_fill(~rejected_Nk, 0).sum(1)[token_n, None].to(x_ND.dtype)
        here = replace(ctx, keys_N=None if ctx.keys_N is None else ctx.keys_N[token_n])
        x_nD = x_ND[token_n]
        if self.moe.apply == "input":
            y_nD = self.overflow_expert.inside(x_nD * weight_n1, here)
        else:
            y_nD = self.overflow_expert.inside(x_nD, here) * weight_n1
        return y_nD.new_zeros(x_ND.shape).index_copy(0, token_n, y_nD)

    def take_share(self, rank: int, ranks: int) -> None:
        self.experts.adds_bias = rank == 0

    @graph_break
    def routed(
        self,
        x_ND: Tensor,
        weight_Nk: Tensor,
        expert_Nk: Tensor,
        valid_N: Tensor | None = None,
        keys_N: Tensor | None = None,
        nowhere_Nk: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Sum of the chosen experts' results (N, D), and how many of this rank's own valid tokens chose each expert
        (E,). nowhere: of the choices (N, k), those that go to no expert."""
        padding = Padding.of(x_ND) if self.exchange is None else Padding()
        dispatch = Dispatch.sort(expert_Nk, self.moe.n_experts, padding, nowhere_Nk)
        weight_R1 = weight_Nk.to(x_ND.dtype).flatten()[dispatch.pair_of_row].unsqueeze(-1)
        x_RD = dispatch.scatter(x_ND)
        keys_R = None
        if keys_N is not None and self.experts.drops:  # an expert's choices for a token are its own
            keys_R = with_numbers(keys_N.unsqueeze(-1), expert_Nk).flatten()[dispatch.pair_of_row]
        multiply = self.experts if self.exchange is None else self._elsewhere
        if self.moe.apply == "input":
            y_RD = multiply(x_RD * weight_R1, dispatch.sizes, keys_R)
        else:
            y_RD = multiply(x_RD, dispatch.sizes, keys_R) * weight_R1
        n_experts, own, counts = self.moe.n_experts, self.region.own(expert_Nk), dispatch.counts
        if valid_N is not None:  # padding counts for an expert beyond the last
            own = own.masked_fill(~self.region.own(valid_N).unsqueeze(-1), n_experts)
        if len(own) != len(expert_Nk) or valid_N is not None or nowhere_Nk is not None:
            counts = torch.bincount(own.flatten(), minlength=n_experts + 1)[:n_experts]
        return dispatch.gather(y_RD), counts

    def _elsewhere(self, x_RD: Tensor, sizes_E: Tensor, keys_R: Tensor | None) -> Tensor:
        """As self.experts, for all experts of all ranks: rows go where their expert is, and their results come back."""
        assert self.exchange is not None
        experts = self.exchange.experts_per_rank
        sizes_re = self.exchange.sizes(sizes_E)  # that arrive from each rank, in its order: by expert
        send: list[int] = sizes_E.view(-1, experts).sum(1).tolist()
        receive: list[int] = sizes_re.sum(1).tolist()
        arrived_SD = self.exchange.swap(x_RD, send, receive)
        experts_re = torch.arange(experts, device=x_RD.device).repeat(len(sizes_re))
        expert_S = experts_re.repeat_interleave(sizes_re.flatten(), output_size=sum(receive))
        here = Dispatch.sort(expert_S.unsqueeze(-1), experts, Padding.of(arrived_SD))
        if keys_R is not None:
            keys_R = self.exchange.swap(keys_R, send, receive)[here.pair_of_row]
        y_SD = here.gather(self.experts(here.scatter(arrived_SD), here.sizes, keys_R))
        return self.exchange.swap(y_SD, receive, send)

    @graph_break  # else each layer would be compiled for its own number
    def previous_counts(self, counts_ME: Tensor | None, like_E: Tensor) -> Tensor:
        """Assignments of the whole previous step in this layer, (E,); all 0 where they are not known yet."""
        return torch.zeros_like(like_E) if counts_ME is None else counts_ME[self.number]

    def statistics(
        self, logits_NE: Tensor, counts_E: Tensor, previous_E: Tensor, valid_N: Tensor | None = None
    ) -> RouterStats:
        """The losses' sums and the counts of this call; of valid tokens only.

        The balance loss compares each token's softmax with the previous whole step's counts, not with its own batch's:
        so it is linear in tokens, and any cut of a batch over ranks and micro-batches adds up to the same number. With
        moe.balance=call it is this call's own counts.
        """
        zero = logits_NE.new_zeros(())
        compared = self.moe.balance != "none" and self.moe.aux_alpha > 0
        share_of = counts_E if self.moe.balance == "call" else previous_E
        balance = self._balance(logits_NE, share_of, valid_N) if compared else zero
        z = self.moe.z_alpha * _of_valid(logits_NE.logsumexp(-1).square(), valid_N).sum() if self.moe.z_alpha else zero
        return RouterStats(balance, z, counts_E)

    def _balance(self, logits_NE: Tensor, previous_E: Tensor, valid_N: Tensor | None) -> Tensor:
        n_experts, total = self.moe.n_experts, previous_E.sum()
        share_E = torch.where(total > 0, previous_E.double() / total.clamp(min=1), 1 / n_experts).to(logits_NE.dtype)
        scale = self.moe.aux_alpha * (n_experts if self.moe.aux_times_experts else 1)
        return scale * (_of_valid(logits_NE.softmax(-1), valid_N).sum(0) @ share_E)


def _of_valid(x_N: Tensor, valid_N: Tensor | None) -> Tensor:
    """x (N, ...) with 0 for tokens that are padding."""
    if valid_N is None:
        return x_N
    return x_N.masked_fill(~valid_N.view(-1, *[1] * (x_N.dim() - 1)), 0)


class Router(nn.Module):
    """x W^T with W (E, D), in float32 at least, whatever its weight is: rounded logits would change which experts are
    chosen."""

    def __init__(self, dim: int, n_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = wide_dtype(x)
        return F.linear(x.to(wide), self.weight.to(wide))


def route(logits_NE: Tensor, moe: MoEArgs) -> tuple[Tensor, Tensor]:
    """Weights (float32) and expert indices of each token's choices, both (N, k)."""
    chosen_Nk, expert_Nk = logits_NE.topk(moe.top_k, dim=-1)
    if moe.score == "sigmoid":
        weight_Nk = chosen_Nk.sigmoid()
    else:
        weight_Nk = (chosen_Nk - logits_NE.logsumexp(-1, keepdim=True)).exp()
    if moe.renorm:
        weight_Nk = weight_Nk / weight_Nk.sum(-1, keepdim=True)
    return weight_Nk, expert_Nk


class Experts(nn.Module):
    """The experts' weights, stacked: w1, w3 (E, D, F) and w2 (E, F, D), of experts without a gate no w3; their biases
    b1, b3 (E, F) and b2 (E, D), where they have any; and of SwiGLU adapters, w1_lora_a (E, D, r) and w1_lora_b
    (E, r, F) of w1, and so on, where they have any.
    """

    adds_bias: bool = True
    """Whether this rank adds b2, where the results of several ranks are summed: one of them does."""
    b1: nn.Parameter | None
    b2: nn.Parameter | None
    b3: nn.Parameter | None

    def __init__(
        self,
        n_experts: int,
        dim: int,
        hidden: int,
        lora: LoraArgs | None = None,
        hidden_dropout: Dropout | None = None,
        kind: ExpertKind = SWIGLU,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.w1 = nn.Parameter(torch.empty(n_experts, dim, hidden))
        self.w2 = nn.Parameter(torch.empty(n_experts, hidden, dim))
        self.w3 = nn.Parameter(torch.empty(n_experts, dim, hidden)) if kind.gated else None
        for name, width in zip(EXPERT_BIASES, (hidden, dim, hidden), strict=True):
            has = kind.bias and (name != "b3" or kind.gated)
            self.register_parameter(name, nn.Parameter(torch.empty(n_experts, width)) if has else None)
        self.lora, self.dropout = lora, 0.0 if lora is None else lora.dropout
        self.hidden_dropout = hidden_dropout
        self.sites: tuple[int, ...] = (0, 0, 0)
        self.first_hidden = 0
        """Keys of the names of the weights; number of the first hidden unit that is on this rank."""
        if lora is None:
            return
        for name in EXPERT_WEIGHTS:
            _, n_in, n_out = getattr(self, name).shape
            setattr(self, f"{name}_{LORA_A}", nn.Parameter(torch.empty(n_experts, n_in, lora.rank)))
            setattr(self, f"{name}_{LORA_B}", nn.Parameter(torch.empty(n_experts, lora.rank, n_out)))

    def forward(self, x_RD: Tensor, sizes_E: Tensor, keys_R: Tensor | None = None) -> Tensor:
        """x_RD holds sizes_E[0] rows of expert 0, then those of expert 1, and so on. keys_R: of each row, where dropout
        is on.
        """
        drop_hidden = None
        if keys_R is not None and self.hidden_dropout is not None:
            drop_hidden = partial(self.hidden_dropout, keys_N=keys_R)
        if self.kind != SWIGLU:
            b2: Tensor | None = self.b2
            if b2 is not None and not self.adds_bias:
                b2 = b2 * 0  # so that it has a gradient here too, to be summed with the others'
            act, stacks = ACTIVATIONS[self.kind.act], (self.w1, self.w2, self.w3)
            return grouped_feed_forward(x_RD, act, stacks, (self.b1, b2, self.b3), sizes_E, drop_hidden)
        assert self.w3 is not None
        weights = self.w1, self.w2, self.w3
        if self.lora is None:
            return grouped_swiglu(x_RD, *weights, sizes_E, drop_hidden)
        first, last = ([getattr(self, f"{name}_{part}") for name in EXPERT_WEIGHTS] for part in (LORA_A, LORA_B))
        adapted = list(zip(weights, first, last, strict=True))
        drop = None if keys_R is None else partial(self._dropped, keys_R)
        return adapted_swiglu(x_RD, adapted, self.lora.scale, sizes_E, drop, drop_hidden)

    @property
    def drops(self) -> bool:
        """Whether training drops anything in it."""
        return self.dropout > 0 or self.hidden_dropout is not None

    def take_hidden_from(self, first: int) -> None:
        """Its weights are those of the hidden units from this one on."""
        self.first_hidden = first
        if self.hidden_dropout is not None:
            self.hidden_dropout = replace(self.hidden_dropout, first=first)

    def _dropped(self, keys_R: Tensor, x: Tensor, weight: int) -> Tensor:
        """What the adapter of EXPERT_WEIGHTS[weight] takes of its input x."""
        first = self.first_hidden if EXPERT_WEIGHTS[weight] == "w2" else 0
        return dropped(x, keys_R, self.sites[weight], self.dropout, first)


def moe_rows(args: ModelArgs) -> Rows:
    """Of what `build_moe` makes. Experts are cut over ranks, and their width by tensor parallelism."""
    moe, hidden, kind = _moe_of(args), args.moe_width(), _kind_of(args)
    first, last = weights(args), weights(args, writes_residual=True)
    up = ParamInfo(
        (moe.n_experts, args.dim, hidden), "expert", first, tensor_dim=2, expert_dim=0, decay=True,
        active=moe.top_k / moe.n_experts, may_be_int8=kind == SWIGLU,
    )  # fmt: skip
    down = replace(up, shape=(moe.n_experts, hidden, args.dim), init=last, tensor_dim=1)
    rows = {"router.weight": ParamInfo((moe.n_experts, args.dim), "router", first)}
    stacks, lora = {"w1": up, "w2": down} | ({"w3": up} if kind.gated else {}), adapter(args.lora, "experts")
    rows |= under("experts", stacks)
    if kind.bias:
        biases = {name.replace("w", "b"): _bias_of(stack) for name, stack in stacks.items()}
        rows |= under("experts", biases)
    for name in stacks:
        rows |= under("experts", stack_adapter_rows(name, stacks[name], lora))
    of_one = FeedForward.declare(args, hidden, kind.gated, kind.bias)
    if moe.overflow:  # it does the work that its experts would have done, which is counted as theirs
        rows |= under("overflow_expert", {name: replace(row, active=0.0) for name, row in of_one.items()})
    return rows | (under("shared_expert", of_one) if moe.shared else {})


def _bias_of(stack: ParamInfo) -> ParamInfo:
    """The bias of a stack of weights (E, n_in, n_out)."""
    cut = 1 if stack.tensor_dim == 2 else None
    shape = stack.shape[0], stack.shape[2]
    return replace(stack, shape=shape, kind="bias", init=ZEROS, tensor_dim=cut, decay=False, may_be_int8=False)


def build_moe(args: ModelArgs, spec: LayerSpec) -> MoE:
    """The MoE layer that `args` describes. Raises ValueError without args.moe."""
    earlier = args.encoder_specs()[: spec.index]
    if not spec.encoder:
        earlier = (*args.encoder_specs(), *args.layer_specs()[: spec.index])
    number = sum(before.ffn == "moe" for before in earlier)
    place = f"{spec.unit}.feed_forward"
    experts, shared, overflow = (
        dropout_at(args.ffn_dropout, "hidden", f"{place}.{of}")
        for of in ("experts", "shared_expert", "overflow_expert")
    )
    dropouts = experts, shared, overflow
    return MoE(args.dim, args.moe_width(), _moe_of(args), number, args.lora, dropouts, _kind_of(args))


def _kind_of(args: ModelArgs) -> ExpertKind:
    return SWIGLU if _moe_of(args).swiglu else ExpertKind(args.act, args.gated, args.ffn_bias)


def _moe_of(args: ModelArgs) -> MoEArgs:
    if args.moe is None:
        raise ValueError("this layer is MoE but model.moe is not given")
    return args.moe


def routing_shape(args: ModelArgs) -> tuple[int, int]:
    """MoE layers of the whole model, and experts of each: (M, E); zeros without any."""
    layers = sum(spec.ffn == "moe" for spec in args.all_specs())
    return layers, args.moe.n_experts if args.moe is not None and layers else 0
