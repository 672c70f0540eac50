"""The recurrence of state-space mixers (SSD; Dao and Gu 2024, arXiv:2405.21060), chunk by chunk.

A head's state S (P, N) goes on as S_t = exp(dt_t A) S_(t-1) + dt_t x_t B_t', and says y_t = S_t C_t. In chunks of Q
tokens this is products of matrices: inside a chunk y_l = sum over s <= l of (C_l B_s) M_ls dt_s x_s, where M_ls is
exp of the sum of dt A over s+1 .. l; what a chunk adds to the state, and what the state before it says, are one product
each over all heads of a group. Memory grows with the length alone: Q numbers a token and head, and a state a chunk.

Exponents are differences of sums that are taken in float64: in float32 those of long chunks lose what small decays say.
All else is float32, or float64 where the inputs are.

Shapes: B rows, T tokens, c chunks, Q tokens of a chunk, H heads, P width of a head, G groups of heads that share B and
C, J = H / G heads of a group, N width of the state.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class Scanned(NamedTuple):
    """What the recurrence says, and what it leaves."""

    y_BTHP: Tensor
    state_BHPN: Tensor
    """After the last token of each row."""


def ssd(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    a_H: Tensor,
    b_BTGN: Tensor,
    c_BTGN: Tensor,
    documents_BT: Tensor | None = None,
    state_BHPN: Tensor | None = None,
    chunk: int = 64,
) -> Scanned:
    """What the recurrence says of every token, and its state after each row's last one.

    dt: 0 at padding, which then changes nothing. a: below 0. documents: int64 that rises where a document of the row
    begins, whose state begins with 0; None = one document a row. state: before the first token; None = 0. All must be
    float32, or all float64.
    """
    n_rows, length, heads, width = x_BTHP.shape
    groups, missing = b_BTGN.shape[2], -length % chunk
    v_BTHP, log_BTH = x_BTHP * dt_BTH[..., None], dt_BTH * a_H
    if missing:
        v_BTHP, b_BTGN, c_BTGN = (pad(y, (0, 0, 0, 0, 0, missing)) for y in (v_BTHP, b_BTGN, c_BTGN))
        log_BTH = pad(log_BTH, (0, 0, 0, missing))
        if documents_BT is not None:
            last_B1 = documents_BT[:, -1:].expand(-1, missing)
            documents_BT = torch.cat([documents_BT, last_B1], dim=1)
    cut = (n_rows, (length + missing) // chunk, chunk)
    v = v_BTHP.view(*cut, groups, -1, width).permute(0, 1, 3, 4, 2, 5)  # (B, c, G, J, Q, P)
    b, c = (y.view(*cut, groups, -1).transpose(2, 3) for y in (b_BTGN, c_BTGN))  # (B, c, G, Q, N)
    sums = log_BTH.view(*cut, groups, -1).permute(0, 1, 3, 4, 2).double().cumsum(-1)  # (B, c, G, J, Q)
    own, carried, whole = _in_documents(documents_BT, cut)
    y = _InChunk.apply(sums, c @ b.mT, v.contiguous(), own)

    kept = (sums[..., -1:] - sums).exp().to(v.dtype)
    if own is not None:
        kept = kept * own[:, :, None, None, -1]
    added = (v * kept[..., None]).transpose(-1, -2).flatten(3, 4) @ b  # (B, c, G, J P, N)
    before = _before(added, sums[..., -1].exp().to(v.dtype), whole, state_BHPN)
    states, last = before[:, :-1], before[:, -1]
    said = (states @ c.mT).unflatten(3, (-1, width)).transpose(-1, -2)  # (B, c, G, J, Q, P)
    reach = sums.exp().to(v.dtype)
    if carried is not None:
        reach = reach * carried[:, :, None, None]
    y = y + said * reach[..., None]
    y_BTHP = y.permute(0, 1, 4, 2, 3, 5).reshape(n_rows, length + missing, heads, width)[:, :length]
    return Scanned(y_BTHP, last.reshape(n_rows, heads, width, -1))


def ssd_step(
    x_BHP: Tensor, dt_BH: Tensor, a_H: Tensor, b_BGN: Tensor, c_BGN: Tensor, state_BHPN: Tensor
) -> tuple[Tensor, Tensor]:
    """What one more token of each row says, (B, H, P), and the state after it."""
    per_group = x_BHP.shape[1] // b_BGN.shape[1]
    b_BHN, c_BHN = (y.repeat_interleave(per_group, dim=1) for y in (b_BGN, c_BGN))
    added = (x_BHP * dt_BH[..., None])[..., None] * b_BHN[:, :, None]
    state_BHPN = torch.exp(dt_BH * a_H)[..., None, None] * state_BHPN + added
    return (state_BHPN @ c_BHN[..., None]).squeeze(-1), state_BHPN


def _in_documents(
    documents_BT: Tensor | None, cut: tuple[int, int, int]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Bool: which tokens of a chunk are of one document (B, c, Q, Q); which are of the document that the chunk before
    ends with (B, c, Q); which chunks end with that one, (B, c). None where each row is one document."""
    if documents_BT is None:
        return None, None, None
    documents = documents_BT.view(cut)
    ends = documents[..., -1]
    before = torch.cat([documents[:, :1, 0], ends[:, :-1]], dim=1)
    return documents[..., None] == documents[..., None, :], documents == before[..., None], ends == before


def _before(added: Tensor, decay: Tensor, whole: Tensor | None, state_BHPN: Tensor | None) -> Tensor:
    """The states before each chunk and after the last, (B, c + 1, G, J P, N), of what each chunk adds (B, c, G, J P, N)
    and of each head's decay over it (B, c, G, J)."""
    if whole is not None:
        decay = decay * whole[:, :, None, None]
    first = added.new_zeros(added[:, 0].shape) if state_BHPN is None else state_BHPN.reshape(added[:, 0].shape)
    found: Tensor = _Recurrence.apply(added, decay, first)
    return found


class _Recurrence(torch.autograd.Function):
    """S_(i+1) = decay_i S_i + added_i, from S_0 = first."""

    @staticmethod
    def forward(ctx: Any, added: Tensor, decay: Tensor, first: Tensor) -> Tensor:
        n_rows, chunks, groups, rows, width = added.shape
        states = added.new_empty(n_rows, chunks + 1, *added.shape[2:])
        states[:, 0] = first
        by_head = (n_rows, chunks + 1, groups, decay.shape[-1], -1, width)
        heads, parts = states.view(by_head), added.view(n_rows, chunks, *by_head[2:])
        for i in range(chunks):
            torch.addcmul(parts[:, i], heads[:, i], decay[:, i, ..., None, None], out=heads[:, i + 1])
        ctx.save_for_backward(states, decay)
        return states

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        states, decay = ctx.saved_tensors
        chunks, by_head = decay.shape[1], (*grad.shape[:3], decay.shape[-1], -1, grad.shape[-1])
        total = grad.contiguous().view(by_head).clone()
        for i in reversed(range(chunks)):
            total[:, i].addcmul_(total[:, i + 1], decay[:, i, ..., None, None])
        of_decay = (total[:, 1:] * states.view(by_head)[:, :-1]).sum((-1, -2))
        total = total.view(grad.shape)
        return total[:, 1:], of_decay, total[:, 0]


class _InChunk(torch.autograd.Function):
    """Of the tokens of a chunk, what those before them and they themselves say to them."""

    @staticmethod
    def forward(ctx: Any, sums: Tensor, scores: Tensor, v: Tensor, own: Tensor | None) -> Tensor:
        """sums (B, c, G, J, Q) float64, scores (B, c, G, Q, Q), v (B, c, G, J, Q, P), own (B, c, Q, Q)."""
        decay = (sums[..., None] - sums[..., None, :]).to(v.dtype)
        hidden = torch.ones(decay.shape[-2:], dtype=torch.bool, device=v.device).triu(1)
        if own is not None:
            hidden = (hidden | ~own)[:, :, None, None]
        decay.masked_fill_(hidden, float("-inf")).exp_()
        ctx.save_for_backward(decay, scores, v)
        return (decay * scores[:, :, :, None]) @ v

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        decay, scores, v = ctx.saved_tensors
        of_weights = grad @ v.mT
        of_scores = (of_weights * decay).sum(3)
        weights = decay * scores[:, :, :, None]
        of_v = weights.mT @ grad
        of_weights *= weights
        return of_weights.sum(-1).double() - of_weights.sum(-2), of_scores, of_v, None
