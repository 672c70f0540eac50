"""Losses over hidden states, without ever holding the logits of a long batch.

The logits of a language model are its largest tensor by far (tokens x vocabulary, float32). Here they exist for one
chunk of tokens at a time: the chunk's gradients are taken at once, while its logits are there, so that the backward has
nothing to recompute.

Where the vocabulary is cut over ranks, a rank has its part of a chunk's logits, and all that ranks exchange is
two numbers a token, once a chunk.

On a CPU in full precision a chunk's logits are made, turned into probabilities and multiplied with both weights block
by block of the vocabulary, with each block's own softmax until the whole sum is known, as in FlashAttention
(arXiv:2205.14135).

Shapes: B batch, T tokens, N = B*T, D model width, V vocabulary (or this rank's share), n tokens of a chunk, v rows of
the vocabulary in a block, b blocks.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llm.kernels.dtypes import wide_dtype

CHUNK_ELEMENTS = {"cpu": 1 << 20, "accelerator": 1 << 25}
"""Logits that exist at a time, in elements: few on a CPU, where a chunk that stays in cache is faster (measured)."""
MIN_CHUNK_TOKENS = 256
"""Smallest chunk whatever the vocabulary, as each chunk adds to the whole weight gradient."""
BLOCK_ELEMENTS = 1 << 18
"""Logits of a chunk that a CPU turns into gradients at a time, so that softmax and what follows stay in its cache."""
TILE_ELEMENTS = 1024 * 2000
"""Logits of a tile, where a chunk goes through the vocabulary in blocks, each of which meets the weights at once
(measured; rows of a power of two would share the same places of a cache)."""
TILED_TOKENS = 512, 1024
"""Tokens of such a chunk: as many as TILED_ELEMENTS allow, within these. With 1,024 a step with a vocabulary of 32,000
takes 2 % less time than with 512, as each chunk adds to the whole weight gradient."""
TILED_ELEMENTS = 1 << 25
"""128 MiB of float32."""
TINY = 1e-30
"""Probabilities above have all the bits of float32 (the smallest normal number is 1.2e-38)."""


class Share(Protocol):
    """This rank's rows of an output matrix that is cut over ranks."""

    first: int
    """Token id of its first row."""
    largest: int
    """Most rows that any rank has."""
    total: int
    """Rows of the whole."""

    def gather(self, x: Tensor) -> Tensor:
        """x of every rank, (ranks, ...); no gradient."""


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """softcap * tanh(logits / softcap) (Gemma Team 2024, arXiv:2408.00118); without a cap the logits themselves."""
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def lm_loss_sum(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    labels_BT: Tensor,
    vocabulary: Share | None = None,
    softcap: float | None = None,
    *,
    factors_BT: Tensor | None = None,
    nll_BT: Tensor | None = None,
) -> Tensor:
    """Sum of the negative log-likelihood of labels >= 0, in nats: float32 scalar, differentiable in hidden and weight.

    factors_BT: float32, what each label's part is multiplied with; unset = 1. nll_BT: float32, is filled with each
    label's negative log-likelihood before that, 0 where the label is negative.

    Softmax and sums are float32, and the weight gradient is accumulated in float32, whatever the dtype of the
    arguments. Without targets the loss is 0 and its gradients are zeros. Any negative label is ignored; one >= V
    raises. With a share of the vocabulary, the gradient of hidden is this rank's term of a sum over ranks.
    """
    hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
    _check_labels(labels_BT, weight_VD, vocabulary)
    per_token = _PerToken(*(None if x is None else x.view(-1) for x in (factors_BT, nll_BT)))
    return _ChunkedCrossEntropy.apply(
        hidden_ND, weight_VD, labels_BT.reshape(-1), vocabulary, softcap, torch.is_grad_enabled(), per_token
    )


@torch.no_grad()
def token_nll(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    labels_BT: Tensor,
    vocabulary: Share | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Negative log-likelihood of each label in nats, (B, T) float32, 0 where the label is negative. No gradient."""
    _check_labels(labels_BT, weight_VD, vocabulary)
    hidden_ND, labels_N = hidden_BTD.flatten(0, 1), labels_BT.flatten()
    chunks = _chunks(hidden_ND, labels_N, weight_VD, vocabulary)
    nll = [_chunk_nll(logits, labels, vocabulary, softcap, grad=False) for logits, _, labels in chunks]
    return torch.cat(nll).float().view(labels_BT.shape)


@torch.no_grad()
def token_hits(
    hidden_BTD: Tensor, weight_VD: Tensor, labels_BT: Tensor, vocabulary: Share | None = None
) -> Tensor:
    """Whether each label is the token of the largest logit, (B, T) bool, False where the label is negative."""
    _check_labels(labels_BT, weight_VD, vocabulary)
    chunks = _chunks(hidden_BTD.flatten(0, 1), labels_BT.flatten(), weight_VD, vocabulary)
    hits = [_likeliest(logits, vocabulary) == labels for logits, _, labels in chunks]
    return torch.cat(hits).view(labels_BT.shape)


def _likeliest(logits_nV: Tensor, vocabulary: Share | None) -> Tensor:
    """The token of the largest logit, (n,) int64; of this rank's share compared with those of the others."""
    largest_n, token_n = logits_nV.max(-1)
    if vocabulary is None:
        return token_n
    # token ids are exact in float64
    of_ranks = vocabulary.gather(torch.stack([largest_n.double(), (token_n + vocabulary.first).double()]))
    best_n = of_ranks[:, 0].argmax(0)
    return of_ranks[:, 1].gather(0, best_n[None])[0].long()


class _PerToken(NamedTuple):
    """What `lm_loss_sum` is given for each token, (N,)."""

    factors_N: Tensor | None
    nll_N: Tensor | None

    def factors(self, done: int, n: int) -> Tensor | None:
        """Of n tokens behind the first `done`."""
        return None if self.factors_N is None else self.factors_N[done : done + n]

    def weighted(self, nll_n: Tensor, done: int) -> Tensor:
        """What these tokens add to the sum; notes their likelihood."""
        if self.nll_N is not None:
            self.nll_N[done : done + len(nll_n)] = nll_n
        factors_n = self.factors(done, len(nll_n))
        return nll_n if factors_n is None else nll_n * factors_n


def _check_labels(labels_BT: Tensor, weight_VD: Tensor, vocabulary: Share | None) -> None:
    """Where labels are looked for in parts of the vocabulary, none would miss one that lies in no part."""
    total = len(weight_VD) if vocabulary is None else vocabulary.total
    torch._assert_async((labels_BT < total).all(), f"a label is not below {total}")


def _chunks(
    hidden_ND: Tensor, labels_N: Tensor, weight_VD: Tensor, vocabulary: Share | None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Logits (n, V), hidden states (n, D) and labels (n,) of one chunk after the other; all logits lie in the same
    memory, whose pages the system has to clear but once.

    Ranks whose shares of the vocabulary differ in size cut the tokens alike.
    """
    on_cpu = hidden_ND.device.type == "cpu"
    rows = len(weight_VD) if vocabulary is None else vocabulary.largest
    n = max(MIN_CHUNK_TOKENS, CHUNK_ELEMENTS["cpu" if on_cpu else "accelerator"] // rows)
    if on_cpu and hidden_ND.element_size() == 2:
        n *= 2  # the same bytes, as only a block of the chunk is ever float32
    memory_nV = hidden_ND.new_empty(min(n, len(hidden_ND)), len(weight_VD))
    for hidden, labels in zip(hidden_ND.split(n), labels_N.split(n), strict=True):
        yield torch.mm(hidden, weight_VD.t(), out=memory_nV[: len(hidden)]), hidden, labels


def _blocks(logits_nV: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some rows of all at a time: on a CPU so few that what is made of them stays in its cache."""
    rows = len(logits_nV)
    if logits_nV.device.type == "cpu":
        rows = max(1, BLOCK_ELEMENTS // logits_nV.shape[1])
    return zip(*(x.split(rows) for x in (logits_nV, *others)), strict=True)


def _chunk_nll(
    logits_nV: Tensor, labels_n: Tensor, vocabulary: Share | None, softcap: float | None, grad: bool
) -> Tensor:
    """Negative log-likelihoods (n,), 0 where the label is ignored; with `grad` the logits become their gradients,
    softmax - one_hot(label), in place.
    """
    take = _whole_nll if vocabulary is None else partial(_share_nll, vocabulary)
    nll_n = take(logits_nV, labels_n, softcap, grad)
    if grad and logits_nV.device.type == "cpu":  # on a GPU, asking which rows are ignored would stall the queue
        logits_nV.index_fill_(0, (labels_n < 0).nonzero().flatten(), 0)
    elif grad:
        logits_nV.mul_((labels_n >= 0).unsqueeze(-1))
    return nll_n.masked_fill_(labels_n < 0, 0)


def _whole_nll(logits_nV: Tensor, labels_n: Tensor, softcap: float | None, grad: bool) -> Tensor:
    """`_chunk_nll` of the whole vocabulary, but for ignored rows."""
    wide = wide_dtype(logits_nV)
    label_n1 = labels_n.clamp(min=0).unsqueeze(-1)
    minus_one_n1 = torch.full_like(label_n1, -1, dtype=wide)
    log_likelihoods = []
    for logits, label, minus_one in _blocks(logits_nV, label_n1, minus_one_n1):
        scores = capped(logits.to(wide), softcap)
        log_p = F.log_softmax(scores, dim=-1)
        log_likelihoods.append(log_p.gather(-1, label))
        if grad:
            p = torch.exp(log_p, out=logits if scores is logits else log_p).scatter_add_(-1, label, minus_one)
            if p is not logits:
                logits.copy_(_through_cap(p, scores, softcap))
    return -torch.cat(log_likelihoods).squeeze(-1)


def _of_share(logits_nV: Tensor, labels_n: Tensor, vocabulary: Share) -> tuple[Tensor, Tensor]:
    """logsumexp (n,) over this rank's share, and the label's logit (n,), 0 where the label lies elsewhere."""
    row_n, mine_n = _in_share(labels_n, vocabulary.first, logits_nV.shape[1])
    target_n = logits_nV.gather(-1, row_n.unsqueeze(-1)).squeeze(-1)
    return logits_nV.logsumexp(-1), target_n.masked_fill_(~mine_n, 0)


def _in_share(labels_n: Tensor, first: int, n_rows: int) -> tuple[Tensor, Tensor]:
    """Row of each label in the share, 0 where it has none, and whether it has one."""
    row_n = labels_n - first
    mine_n = (labels_n >= 0) & (row_n >= 0) & (row_n < n_rows)
    return row_n.masked_fill(~mine_n, 0), mine_n


def _across_shares(log_z_n: Tensor, target_n: Tensor, vocabulary: Share) -> tuple[Tensor, Tensor]:
    """The same two over the whole vocabulary: equal bits on every rank."""
    both_r2n = vocabulary.gather(torch.stack([log_z_n, target_n]))
    return both_r2n[:, 0].logsumexp(0), both_r2n[:, 1].sum(0)


def _share_nll(
    vocabulary: Share, logits_nV: Tensor, labels_n: Tensor, softcap: float | None, grad: bool
) -> Tensor:
    """`_chunk_nll` of this rank's share, but for ignored rows; the nll is that of the whole vocabulary."""
    wide = wide_dtype(logits_nV)
    own = [
        _of_share(capped(logits.to(wide), softcap), labels, vocabulary)
        for logits, labels in _blocks(logits_nV, labels_n)
    ]
    own_log_z, own_target = zip(*own, strict=True)
    log_z_n, target_n = _across_shares(torch.cat(own_log_z), torch.cat(own_target), vocabulary)
    if grad:
        for logits, labels, log_z in _blocks(logits_nV, labels_n, log_z_n):
            row, mine = _in_share(labels, vocabulary.first, logits.shape[1])
            scores = capped(logits.to(wide), softcap)
            p = (scores - log_z.unsqueeze(-1)).exp_()
            p.scatter_add_(-1, row.unsqueeze(-1), -mine.unsqueeze(-1).to(wide))
            logits.copy_(_through_cap(p, scores, softcap))
    return log_z_n - target_n


def _tiles_suit(hidden_ND: Tensor) -> bool:
    """Half precision would round each tile's products and a GPU would start more kernels: they take chunks."""
    return hidden_ND.device.type == "cpu" and hidden_ND.dtype == wide_dtype(hidden_ND)


def _take_chunks(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    vocabulary: Share | None,
    softcap: float | None,
    grad_hidden_ND: Tensor | None,
    grad_weight_VD: Tensor | None,
    per_token: _PerToken,
) -> Tensor:
    """Sum of the negative log-likelihoods; gradients are written where there is a place for them."""
    with_grad = grad_hidden_ND is not None or grad_weight_VD is not None
    total = hidden_ND.new_zeros((), dtype=wide_dtype(hidden_ND))
    done = 0
    for logits, hidden, labels in _chunks(hidden_ND, labels_N, weight_VD, vocabulary):
        total += per_token.weighted(_chunk_nll(logits, labels, vocabulary, softcap, with_grad), done).sum()
        factors_n = per_token.factors(done, len(labels))
        if with_grad and factors_n is not None:
            logits *= factors_n.unsqueeze(-1)
        if grad_hidden_ND is not None:  # the logits are now their gradients
            torch.mm(logits, weight_VD, out=grad_hidden_ND[done : done + len(labels)])
        if grad_weight_VD is not None:
            _accumulate(grad_weight_VD, logits.t(), hidden, first=done == 0)
        done += len(labels)
    return total


def _take_tiles(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    vocabulary: Share | None,
    softcap: float | None,
    grad_hidden_ND: Tensor | None,
    grad_weight_VD: Tensor | None,
    per_token: _PerToken,
) -> Tensor:
    """`_take_chunks` through the vocabulary in blocks.

    A tile holds the softmax of its own scores: a gradient but for a factor a row, which goes into what the tile is
    multiplied with, and for the label's own share, which is added at the end.
    """
    first, largest = (0, len(weight_VD)) if vocabulary is None else (vocabulary.first, vocabulary.largest)
    fewest, most = TILED_TOKENS
    n = max(min(TILED_ELEMENTS // largest, most), fewest, TILE_ELEMENTS // largest)
    weights = weight_VD.split(max(1, TILE_ELEMENTS // n))
    firsts = [first + i * len(weights[0]) for i in range(len(weights))]
    grad_weights = () if grad_weight_VD is None else grad_weight_VD.split(len(weights[0]))
    memory = hidden_ND.new_empty(min(n, len(hidden_ND)) * len(weight_VD))
    total = hidden_ND.new_zeros(())
    done = 0
    for hidden, labels in zip(hidden_ND.split(n), labels_N.split(n), strict=True):
        tiles_nv = memory[: len(labels) * len(weight_VD)].split([len(labels) * len(weight) for weight in weights])
        tiles_nv = tuple(tile.view(len(labels), -1) for tile in tiles_nv)
        tile_log_z, target_n = [], hidden.new_zeros(len(labels))
        for tile, weight, start in zip(tiles_nv, weights, firsts, strict=True):
            scores = capped(torch.mm(hidden, weight.t(), out=tile), softcap)
            row, mine = _in_share(labels, start, len(weight))
            target_n += scores.gather(-1, row.unsqueeze(-1)).squeeze(-1).masked_fill_(~mine, 0)
            tile_log_z.append(_softmax_into(tile, scores, partial(_rows_scores, hidden, weight, softcap)))
            _through_cap(tile, scores, softcap)
        log_z_bn = torch.stack(tile_log_z)
        own_log_z_n = log_z_bn.logsumexp(0)
        log_z_n, label_score_n = own_log_z_n, target_n
        if vocabulary is not None:
            log_z_n, label_score_n = _across_shares(own_log_z_n, target_n, vocabulary)
        total += per_token.weighted((log_z_n - label_score_n).masked_fill_(labels < 0, 0), done).sum()

        factor_bn1 = (log_z_bn - log_z_n).exp_().mul_(labels >= 0).unsqueeze(-1)
        row, mine = _in_share(labels, first, len(weight_VD))
        pull_n1 = _through_cap(-mine.to(hidden.dtype), target_n, softcap).unsqueeze(-1)
        factors_n = per_token.factors(done, len(labels))
        if factors_n is not None:
            factor_bn1 = factor_bn1 * factors_n.unsqueeze(-1)
            pull_n1 = pull_n1 * factors_n.unsqueeze(-1)
        if grad_hidden_ND is not None:
            grad_hidden = torch.mul(weight_VD[row], pull_n1, out=grad_hidden_ND[done : done + len(labels)])
        for i, (tile, weight, factor_n1) in enumerate(zip(tiles_nv, weights, factor_bn1, strict=True)):
            if grad_hidden_ND is not None:
                grad_hidden.addcmul_(tile @ weight, factor_n1)
            if grad_weight_VD is not None:
                _accumulate(grad_weights[i], tile.t(), hidden * factor_n1, first=done == 0)
        if grad_weight_VD is not None:
            grad_weight_VD.index_add_(0, row, hidden * pull_n1)
        done += len(labels)
    return total


def _softmax_into(out_nv: Tensor, scores_nv: Tensor, again: Callable[[Tensor], Tensor]) -> Tensor:
    """Writes the softmax of each row and returns logsumexp (n,). `out_nv` may be the scores' own memory: `again` makes
    the rows of the given indices once more.

    All of a softmax is done while a row is in the cache, but the sum that it divides by is not known: any probability
    and its score show it, but one that was rounded to nothing.
    """
    first_n = scores_nv[:, 0].clone()
    first_p_n = torch.softmax(scores_nv, -1, out=out_nv)[:, 0]
    log_z_n = first_n - first_p_n.log()
    untold = (~(first_p_n > TINY)).nonzero().flatten()
    if len(untold):
        log_z_n[untold] = again(untold).logsumexp(-1)
    return log_z_n


def _rows_scores(hidden_nD: Tensor, weight_vD: Tensor, softcap: float | None, rows: Tensor) -> Tensor:
    return capped(hidden_nD[rows] @ weight_vD.t(), softcap)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        vocabulary: Share | None,
        softcap: float | None,
        with_grad: bool,
        per_token: _PerToken,
    ) -> Tensor:
        with_hidden, with_weight = (with_grad and need for need in ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden_ND) if with_hidden else None
        grad_weight = torch.empty_like(weight_VD, dtype=wide_dtype(hidden_ND)) if with_weight else None
        gradients = grad_hidden, grad_weight
        take = _take_tiles if (with_hidden or with_weight) and _tiles_suit(hidden_ND) else _take_chunks
        total = take(hidden_ND, weight_VD, labels_N, vocabulary, softcap, *gradients, per_token)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden_ND.dtype, weight_VD.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None, None]:
        # scaled before rounding: a rounded 1/N would scale the whole gradient, and fp16 cannot hold a sum over tokens
        grad_hidden, grad_weight = (
            None if g is None else (g.to(grad.dtype) * grad).to(dtype)
            for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return grad_hidden, grad_weight, None, None, None, None, None


def _through_cap(grad: Tensor, scores: Tensor, softcap: float | None) -> Tensor:
    """The gradient of logits, given that of their capped scores; overwrites its argument."""
    return grad if softcap is None else grad.mul_(1 - (scores / softcap).square())


def _accumulate(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a @ b in total's dtype; the first time total = a @ b, whatever it holds."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=0 if first else 1, out=total)
    elif first:
        total.copy_(a @ b)
    else:
        total += a @ b
