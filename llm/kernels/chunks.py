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
        if dropout is None:
            made.append(masked_attention(q[:, :, rows], k, v, seen, scores))
        else:
            made.append(_with_dropout(q[:, :, rows], k, v, seen, scores, dropout, rows))
    return torch.cat(made, dim=2).transpose(1, 2).to(dtype)


def _with_dropout(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scores: Scores, dropout: LostWeights, rows: slice
) -> Tensor:
    """(B, H, t, d), by weights that are made, in float32."""
    wide, n_kv = torch.promote_types(q.dtype, torch.float32), k.shape[1]
    grouped, k, v = (x.to(wide).unflatten(1, (n_kv, -1)) for x in (q, k, v))
    cap, scale = scores.softcap, q.shape[-1] ** -0.5 if scores.scale is None else scores.scale
    made = grouped @ k.mT * scale
    made = made if cap is None else torch.tanh(made / cap) * cap
    weights = made.masked_fill(~seen[:, :, None], -torch.inf).softmax(-1)
    where = dropout.where(q.shape[1], rows, slice(0, k.shape[-2])).view(weights.shape)
    return ((weights * dropout.scale).masked_fill(where, 0) @ v).flatten(1, 2).to(q.dtype)
