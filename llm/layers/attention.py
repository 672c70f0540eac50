"""Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) with the additions of Llama 4 and others.

On RoPE layers queries and keys are rotated. qk_norm RMS-normalises them: "l2" each head without weights, after that
(Llama 4); before it, "plain" each head without weights, on layers without RoPE too (Muse Glimmer), "head" each head
with one weight for all (Qwen 3), and "full" all heads of a token as one (OLMo 2). Scores are scaled, and capped where
attn_softcap says so (Gemma 2). On NoPE layers with temperature tuning, queries at position p are multiplied by
1 + attn_scale ln(1 + floor((p + 1) / floor_scale)). With a gate, what each head makes of the values is multiplied with
the sigmoid of wg x, element by element, before wo (Qiu et al. 2025, arXiv:2505.06708).

Cross attention is the same, but that keys and values are those of a memory: of what an encoder made of the source.

Shapes: B batch, T tokens, S source tokens, D model width, H query heads, K kv heads, d head width.
"""

from dataclasses import replace

from torch import Tensor, nn

from llm.args import AttentionSpec, LayerSpec, ModelArgs
from llm.args.layers import cross_attention, resolve_attention
from llm.args.lora import adapter
from llm.kernels.graph_breaks import graph_break
from llm.kernels.norms import rms_normalise
from llm.kernels.rotate import Turns, rotate
from llm.layers.across import AttendAcross
from llm.layers.context import Context
from llm.layers.linear import Linear
from llm.layers.masks import Attend
from llm.layers.norm import HeadsNorm, make_norm, norm_rows
from llm.layers.parameter import Rows, under, weights
from llm.layers.region import InRegion


class Attention(nn.Module, InRegion):
    """Self-attention of one layer, as its AttentionSpec says, or its cross attention."""

    resolve = staticmethod(resolve_attention)

    def __init__(self, args: ModelArgs, spec: LayerSpec, cross: bool = False) -> None:
        super().__init__()
        self.layer, self.cross = spec.index, cross
        self.spec = cross_attention(args) if cross else attention_spec(spec)
        self.head_dim = args.head_width
        self.norm_eps = args.norm_eps
        self.interleaved = args.rope_interleaved
        queries, keys = args.n_heads * args.head_width, args.kv_heads * args.head_width
        self.wq = Linear(args.dim, queries, args.qkv_bias, adapter(args.lora, "wq"))
        self.wk = Linear(args.dim, keys, args.qkv_bias, adapter(args.lora, "wk"))
        self.wv = Linear(args.dim, keys, args.qkv_bias, adapter(args.lora, "wv"))
        self.wg = Linear(args.dim, queries, False, adapter(args.lora, "wg")) if self.spec.gate else None
        self.wo = Linear(queries, args.dim, args.o_bias, adapter(args.lora, "wo"))
        self.kv_heads = args.kv_heads
        self.q_norm, self.k_norm = (head_norm(args, self.spec, heads) for heads in (args.n_heads, args.kv_heads))

    @staticmethod
    def declare(args: ModelArgs, spec: LayerSpec, cross: bool = False) -> Rows:
        """What the parameters are: see llm/layers/parameter.py. Heads are cut whole."""
        own = cross_attention(args) if cross else attention_spec(spec)
        dim, std = args.dim, weights(args)
        queries, keys = ((heads, heads * args.head_width) for heads in (args.n_heads, args.kv_heads))
        rows: Rows = {}
        for name, (heads, width) in (("wq", queries), ("wk", keys), ("wv", keys)):
            lora = adapter(args.lora, name)
            rows |= under(name, Linear.declare(dim, width, args.qkv_bias, std, tensor_dim=0, grain=heads, lora=lora))
        if own.gate:
            lora = adapter(args.lora, "wg")
            rows |= under("wg", Linear.declare(dim, queries[1], False, std, tensor_dim=0, grain=queries[0], lora=lora))
        residual, lora = weights(args, writes_residual=True), adapter(args.lora, "wo")
        out = Linear.declare(queries[1], dim, args.o_bias, residual, tensor_dim=1, grain=args.n_heads, lora=lora)
        rows |= under("wo", out)
        for name, heads in (("q_norm", args.n_heads), ("k_norm", args.kv_heads)):
            rows |= under(name, head_norm_rows(args, own, heads))
        return rows

    @staticmethod
    def flops(args: ModelArgs, spec: LayerSpec, seq_len: int) -> int:
        """Of a token beyond those of the parameters: scores and values of all tokens in its span, counted as if none
        lay ahead of it.
        """
        return 12 * args.n_heads * args.head_width * min(seq_len, attention_spec(spec).span or seq_len)

    def take_share(self, rank: int, ranks: int) -> None:
        self.wo.adds_bias = rank == 0
        if self.kv_heads < ranks:  # all ranks have the weights of keys and values, and compute one head's
            head = rank * self.kv_heads // ranks
            self.wk.rows = self.wv.rows = slice(head * self.head_dim, (head + 1) * self.head_dim)
            if isinstance(self.k_norm, HeadsNorm):
                self.k_norm.rows = self.wk.rows

    def forward(self, x_BTD: Tensor, ctx: Context, memory_BSD: Tensor | None = None) -> Tensor:
        """memory: of cross attention, in the form of x, of the tokens of ctx.source; None where its keys and values are
        remembered.
        """
        inside = self.inside(self._entered(x_BTD, ctx), ctx, memory_BSD)
        return self.region.leave(inside, ctx.cut_sequence)

    def inside(self, x: Tensor, ctx: Context, memory_BSD: Tensor | None = None) -> Tensor:
        """The work between the edges of the region, for a layer that has entered it."""
        made = (self._across(x, ctx, memory_BSD) if self.cross else self._within(x, ctx)).flatten(-2)
        if self.wg is not None:
            made = made * self.wg(x, ctx.keys_N).sigmoid()
        out: Tensor = self.wo(made, ctx.keys_N)
        return out

    def _entered(self, x_BTD: Tensor, ctx: Context) -> Tensor:
        x = self.region.enter(x_BTD, ctx.cut_sequence)
        return x.unflatten(0, ctx.shape) if x.ndim == 2 else x

    def _within(self, x: Tensor, ctx: Context) -> Tensor:
        """What each head of each token makes of the values, (B, T, H, d)."""
        q, k, v = (w(x, ctx.keys_N).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q, k = (self._placed(y, norm, ctx.rotation_BT1m) for y, norm in ((q, self.q_norm), (k, self.k_norm)))
        if self.spec.temperature:
            assert ctx.temperature_BT11 is not None
            q = (q * ctx.temperature_BT11).to(q.dtype)
        assert ctx.attend is not None
        return self._attended(ctx.attend, q, k, v)

    def _across(self, x: Tensor, ctx: Context, memory_BSD: Tensor | None) -> Tensor:
        """The same, of the values of the memory."""
        q = self._normed(self.wq(x, ctx.keys_N).unflatten(-1, (-1, self.head_dim)), self.q_norm)
        k, v = (None, None) if memory_BSD is None else self.of_memory(memory_BSD, ctx)
        assert ctx.across is not None
        return self._attended(ctx.across, q, k, v)

    def of_memory(self, memory_BSD: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """Keys and values of a memory for cross attention, (B, S, K, d)."""
        assert ctx.source is not None
        memory = self._entered(memory_BSD, ctx.source)
        k, v = (w(memory, ctx.source.keys_N).unflatten(-1, (-1, self.head_dim)) for w in (self.wk, self.wv))
        return self._normed(k, self.k_norm), v

    def _placed(self, heads: Tensor, norm: nn.Module | None, rotation_BT1m: Tensor | Turns | None) -> Tensor:
        """Queries or keys as scores are made of them."""
        heads = self._normed(heads, norm)
        if self.spec.rope:
            assert rotation_BT1m is not None
            heads = rotate(heads, rotation_BT1m, self.interleaved)
        return rms_normalise(heads, self.norm_eps) if self.spec.qk_norm == "l2" else heads

    def _normed(self, heads: Tensor, norm: nn.Module | None) -> Tensor:
        heads = heads if norm is None else norm(heads)
        return rms_normalise(heads, self.norm_eps) if self.spec.qk_norm == "plain" else heads

    @graph_break
    def _attended(
        self, attend: Attend | AttendAcross, q_BTHd: Tensor, k_BTKd: Tensor | None, v_BTKd: Tensor | None
    ) -> Tensor:
        """What it does follows the documents of a batch; a graph with a layer's number would be that layer's alone."""
        return attend(self.layer, self.spec, q_BTHd, k_BTKd, v_BTKd)  # type: ignore[arg-type]  # Attend has its own


def head_norm(args: ModelArgs, spec: AttentionSpec, n_heads: int) -> nn.Module | None:
    """The norm with weights of so many heads (..., H, d), where the layer has one."""
    if spec.qk_norm == "head":
        return make_norm(args, args.head_width)
    if spec.qk_norm == "full":
        return HeadsNorm(n_heads * args.head_width, args.norm_eps, args.norm_offset)
    return None


def head_norm_rows(args: ModelArgs, spec: AttentionSpec, n_heads: int) -> Rows:
    """Of what `head_norm` makes: one weight for every head, or each head's own."""
    if spec.qk_norm == "head":
        return norm_rows(args, args.head_width, in_region=True)
    if spec.qk_norm == "full":
        weight = norm_rows(args, n_heads * args.head_width, in_region=True)["weight"]
        return {"weight": replace(weight, tensor_dim=0, grain=n_heads)}
    return {}


def attention_spec(spec: LayerSpec) -> AttentionSpec:
    """Of a layer that has attention, of whatever kind; ValueError for another."""
    if spec.heads is None:
        raise ValueError(f"layer {spec.index} mixes its tokens by {spec.mixer.name}, not by attention")
    return spec.heads
