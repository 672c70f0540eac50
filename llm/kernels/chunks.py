"""Attention to chunks: of each token to a stretch of fewer keys than there are tokens, and to nothing.

"Nothing" is a key of zeros with values of zeros: its score is 0, so that what a token makes of n keys is
sum of e^s v / (1 + sum of e^s), and 0 where it sees none.

Shapes: B rows, T tokens, S keys, H query heads, K kv heads, d head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from llm.kernels.attention import masked_attention
from llm.kernels.explicit_attention import weights_at_once
from llm.kernels.keyed import LostWeights
from llm.kernels.scores import Scores

QUERIES = 512
"""Whose masks exist at a time."""


def attend_chunks(
    q_BTHd: Tensor,
    k_BSKd: Tensor,
    v_BSKd: Tensor,
    first_BT: Tensor,
    last_BT: Tensor,
    scores: Scores,
    dropout: LostWeights | None = None,
) -> Tensor:
    """(B, T, H, d). first, last: int64, the keys that each token sees, from the first to the last; none where the last
    lies before the first. dropout: which weights are lost, the key's place being one more than its number."""
    dtype = q_BTHd.dtype
    if q_BTHd.device.type == "cpu" and dtype == torch.bfloat16:  # its backward in bf16 is slow
        q_BTHd, k_BSKd, v_BSKd = q_BTHd.float(), k_BSKd.float(), v_BSKd.float()
    q = q_BTHd.transpose(1, 2)
    k, v = (F.pad(x, (0, 0, 0, 0, 1, 0)).transpose(1, 2) for x in (k_BSKd, v_BSKd))
    n_rows, heads, length, _ = q.shape
    step = QUERIES if dropout is None else weights_at_once(n_rows, heads, k.shape[2])
    key = torch.arange(-1, k.shape[2] - 1, device=q.device)
    made = []
    for low in range(0, length, step):
        rows = slice(low, min(low + step, length))
        first, last = first_BT[:, rows, None], last_BT[:, rows, None]
        seen = ((key >= first) & (key <= last) | (key < 0))[:, None]
        made.append(attend_seen(q[:, :, rows], k, v, seen, scores, dropout, rows))
    return torch.cat(made, dim=2).transpose(1, 2).to(dtype)


def attend_packed(
    q_BTHd: Tensor,
    k_BSKd: Tensor,
    v_BSKd: Tensor,
    documents_BT: Tensor | None,
    there_BT: Tensor,
    before_B: Tensor | None,
    scores: Scores,
    dropout: LostWeights | None = None,
) -> Tensor:
    """(B, T, H, d): attention of tokens that were taken out of longer rows to those before them of their document and
    to themselves. Keys are the same tokens, or where rows go on, S - T earlier ones before them, of which the first
    `before` of each row are there. there: false for places that hold no token, which see themselves alone."""
    dtype = q_BTHd.dtype
    if q_BTHd.device.type == "cpu" and dtype == torch.bfloat16:  # its backward in bf16 is slow
        q_BTHd, k_BSKd, v_BSKd = q_BTHd.float(), k_BSKd.float(), v_BSKd.float()
    q, k, v = (x.transpose(1, 2) for x in (q_BTHd, k_BSKd, v_BSKd))
    n_rows, heads, length, _ = q.shape
    earlier = k.shape[2] - length
    step = QUERIES if dropout is None else weights_at_once(n_rows, heads, k.shape[2])
    place, made = torch.arange(length, device=q.device), []
    for low in range(0, length, step):
        rows, keys = slice(low, min(low + step, length)), slice(0, min(low + step, length))
        query, key = place[rows, None], place[keys]
        own = (key <= query) & there_BT[:, None, keys]
        if documents_BT is not None:
            own = own & (documents_BT[:, rows, None] == documents_BT[:, None, keys])
        seen = own | (key == query)
        if earlier:
            assert before_B is not None
            kept = torch.arange(earlier, device=q.device) < before_B[:, None]
            seen = torch.cat([kept[:, None].expand(-1, seen.shape[1], -1), seen], dim=2)
        end = earlier + keys.stop
        made.append(attend_seen(q[:, :, rows], k[:, :, :end], v[:, :, :end], seen[:, None], scores, dropout, rows))
    return torch.cat(made, dim=2).transpose(1, 2).to(dtype)


def attend_seen(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scores: Scores, dropout: LostWeights | None, rows: slice
) -> Tensor:
    """(B, H, t, d) of the queries `rows` to the keys that `seen` (B, 1, t, S) says. Where weights are dropped, by
    weights that are made, in float32."""
    if dropout is None:
        return masked_attention(q, k, v, seen, scores)
    wide, n_kv = torch.promote_types(q.dtype, torch.float32), k.shape[1]
    grouped, k, v = (x.to(wide).unflatten(1, (n_kv, -1)) for x in (q, k, v))
    cap, scale = scores.softcap, q.shape[-1] ** -0.5 if scores.scale is None else scores.scale
    made = grouped @ k.mT * scale
    made = made if cap is None else torch.tanh(made / cap) * cap
    weights = made.masked_fill(~seen[:, :, None], -torch.inf).softmax(-1)
    where = dropout.where(q.shape[1], rows, slice(0, k.shape[-2])).view(weights.shape)
    return ((weights * dropout.scale).masked_fill(where, 0) @ v).flatten(1, 2).to(q.dtype)
