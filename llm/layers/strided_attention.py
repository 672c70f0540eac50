"""Attention of each token to one vector for s tokens of its document, and to nothing: see llm/layers/strides.py and
llm/kernels/chunks.py. Queries and their positions are the tokens'; a chunk's key lies at the position of its last one.

Shapes: B rows, T tokens, S chunks, D model width, H query heads, K kv heads, d head width, s stride.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llm.args import LayerSpec, ModelArgs
from llm.args.layers import LayerItem, StridedAttentionSpec, refuse
from llm.kernels.chunks import attend_chunks
from llm.kernels.graph_breaks import graph_break
from llm.kernels.rotate import Turns
from llm.layers.attention import Attention
from llm.layers.context import Context
from llm.layers.masks import scores_of
from llm.layers.parameter import Rows, under
from llm.layers.strides import Chunks, Pool, at_chunks


@dataclass
class ChunkKeys:
    """What a layer remembers of some rows."""

    pending_BsD: Tensor
    """The last s - 1 tokens' vectors."""
    keys_BSKd: Tensor
    values_BSKd: Tensor

    @property
    def nbytes(self) -> int:
        return self.pending_BsD.nbytes + self.keys_BSKd.nbytes + self.values_BSKd.nbytes

    def reorder(self, rows: Tensor) -> None:
        rows = rows.to(self.keys_BSKd.device)
        self.pending_BsD = self.pending_BsD.index_select(0, rows)
        self.keys_BSKd = self.keys_BSKd.index_select(0, rows)
        self.values_BSKd = self.values_BSKd.index_select(0, rows)

    def put(self, k_BSKd: Tensor, v_BSKd: Tensor, chunks: Chunks) -> None:
        """Add the keys and values of the chunks that are there, at their numbers."""
        self.keys_BSKd, self.values_BSKd = (
            _with_room(kept, chunks.kept) for kept in (self.keys_BSKd, self.values_BSKd)
        )
        rows, columns = chunks.filled
        places = rows, chunks.slots_BK[rows, columns]
        self.keys_BSKd[places], self.values_BSKd[places] = k_BSKd[rows, columns], v_BSKd[rows, columns]


def _with_room(kept: Tensor, length: int) -> Tensor:
    """No more is taken than there are chunks, and those are few: so it is copied when one comes."""
    missing = length - kept.shape[1]
    return torch.cat([kept, kept.new_zeros(len(kept), missing, *kept.shape[2:])], dim=1) if missing > 0 else kept


class StridedAttention(Attention):
    """The mixer that layer patterns write as `attn@s`."""

    def __init__(self, args: ModelArgs, spec: LayerSpec) -> None:
        super().__init__(args, spec)
        self.stride = spec.stride
        self.pool = Pool(spec.stride, args.dim)

    @staticmethod
    def resolve(args: ModelArgs, item: LayerItem) -> StridedAttentionSpec:
        refuse(item.text, "attention with a stride is written attn@STRIDE")

    @staticmethod
    def declare(args: ModelArgs, spec: LayerSpec, cross: bool = False) -> Rows:
        rows = Attention.declare(args, spec, cross)
        for name in rows:
            if name.startswith(("wk.", "wv.")):
                rows[name] = replace(rows[name], active=rows[name].active / spec.stride)
        return rows | under("pool", Pool.declare(spec.stride, args.dim))

    @staticmethod
    def flops(args: ModelArgs, spec: LayerSpec, seq_len: int) -> int:
        return 12 * args.n_heads * args.head_width * seq_len // spec.stride

    def _within(self, x: Tensor, ctx: Context) -> Tensor:
        assert ctx.strides is not None
        chunks, remembered, stream = ctx.strides.of(self.stride), None, x
        if ctx.states is not None:
            remembered = ctx.states.state(self.layer, lambda: self._new_state(x))
            stream = torch.cat([remembered.pending_BsD, x], dim=1)
            remembered.pending_BsD = at_chunks(stream, chunks.left_Bs)
        pooled = self.pool(stream, chunks.tokens_BKs)
        keys = None if ctx.keys_N is None else at_chunks(ctx.keys_N.view(ctx.shape), chunks.ends_BK).flatten()
        q = self.wq(x, ctx.keys_N).unflatten(-1, (-1, self.head_dim))
        k, v = (w(pooled, keys).unflatten(-1, (-1, self.head_dim)) for w in (self.wk, self.wv))
        rotation = ctx.rotation_BT1m
        assert not isinstance(rotation, Turns)
        at_ends = None if rotation is None else at_chunks(rotation, chunks.ends_BK)
        q, k = self._placed(q, self.q_norm, rotation), self._placed(k, self.k_norm, at_ends)
        if self.spec.temperature:
            assert ctx.temperature_BT11 is not None
            q = (q * ctx.temperature_BT11).to(q.dtype)
        return self._attended_chunks(q, k, v, chunks, remembered, ctx)

    def _new_state(self, x: Tensor) -> ChunkKeys:
        heads = len(self.wk.weight) if self.wk.rows is None else self.wk.rows.stop - self.wk.rows.start
        none = x.new_zeros(len(x), 0, heads // self.head_dim, self.head_dim)
        return ChunkKeys(x.new_zeros(len(x), self.stride - 1, x.shape[-1]), none, none)

    @graph_break
    def _attended_chunks(
        self,
        q_BTHd: Tensor,
        k_BSKd: Tensor,
        v_BSKd: Tensor,
        chunks: Chunks,
        remembered: ChunkKeys | None,
        ctx: Context,
    ) -> Tensor:
        if remembered is not None:
            remembered.put(k_BSKd, v_BSKd, chunks)
            k_BSKd, v_BSKd = remembered.keys_BSKd, remembered.values_BSKd
        lost = None if ctx.attention_dropout is None else ctx.attention_dropout.of_layer(self.layer)
        return attend_chunks(q_BTHd, k_BSKd, v_BSKd, chunks.first_BT, chunks.last_BT, scores_of(self.spec), lost)
