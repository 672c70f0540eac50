"""Transformer Components' layers by name: attention of three kinds, feed-forward, mixture of experts, encoder and
decoder layer; to call, to subclass, and to give to a model.

Each is the model's own class of that part, made and called as the document has it. A model gives a part a context
beside its states; a subclass need not know: it overrides `forward` as it is here, and what the model gave is held until
the base class asks for it. Alone, a part makes a context of its own: rows without padding, from position 0.

Shapes: B rows, T tokens of a row, S keys or tokens of a memory, D model width, H query heads, K kv heads, d head width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from llm.args import LayerSpec, ModelArgs, MoEArgs
from llm.cache import Cache
from llm.contexts import make_contexts
from llm.datatypes import RouterStats, TransformerInput
from llm.init import initialise
from llm.layers.attention import Attention, attention_spec, cross_attention
from llm.layers.block import Block
from llm.layers.context import Context
from llm.layers.dropout import dropout_at, keys_or_drawn
from llm.layers.ffn import FeedForward as DenseFeedForward
from llm.layers.ffn import feed_forward_rows
from llm.layers.moe import ExpertKind, MoE, moe_rows
from llm.layers.parameter import Rows
from llm.siblings.components_config import FFNConfig, kv_heads, layer_keys, model_args, moe_keys
from llm.siblings.components_functions import create_causal_mask, scaled_dot_product_attention

OF_CALLS = ("held", "aux_loss", "overflow_rate", "_cache", "_stats", "_read", "_written")
"""What parts and models keep of their calls."""


def without_calls(module: nn.Module) -> dict[str, Any]:
    """What a copy of a module takes over: no graph, nor rows, of earlier calls."""
    return {key: value for key, value in module.__dict__.items() if key not in OF_CALLS}


class Part(nn.Module):
    """What they have in common."""

    held: Context | None = None
    """What a model gave for the call that is going on."""
    own_args: ModelArgs
    """Of a model of this layer alone."""

    def __getstate__(self) -> dict[str, Any]:
        return without_calls(self)

    @contextmanager
    def holding(self, ctx: Context) -> Iterator[None]:
        """What the model gives is there until the call ends."""
        before, self.held = self.held, ctx
        try:
            yield
        finally:
            self.held = before

    def begin(self, args: ModelArgs, rows: Rows) -> None:
        """Initial values, drawn by a seed that torch's generator gives."""
        self.own_args = args
        seed = int(torch.randint(1 << 31, (), device="cpu"))
        initialise(self, {name: row.init for name, row in rows.items()}, seed)

    def alone(self, x_BTD: Tensor, memory_BSD: Tensor | None = None, cache: Cache | None = None) -> Context:
        """The context of a call outside of a model."""
        args = self.own_args
        for name, states in (("states", x_BTD), ("memory", memory_BSD)):
            if states is not None and (states.ndim != 3 or states.shape[-1] != args.dim):
                raise ValueError(f"{name} must have shape (B, T, embed_dim={args.dim}); got {tuple(states.shape)}")
        tokens = _tokens(x_BTD)
        source = None if memory_BSD is None else TransformerInput(_tokens(memory_BSD))
        keys_N = keys_or_drawn(None, tokens, self.training and args.drops)
        encoders = () if source is None else args.encoder_specs()
        given = TransformerInput(tokens, source=source)
        return make_contexts(args, args.layer_specs(), encoders, given, cache, None, keys_N, False, False)


def _tokens(x_BTD: Tensor) -> Tensor:
    """Ids in the place of those that the states are of."""
    return torch.zeros(x_BTD.shape[:2], dtype=torch.int64, device=x_BTD.device)


def _alone(keys: dict[str, Any], **more: Any) -> ModelArgs:
    """A model of one such layer."""
    return model_args({**keys, "n_layers": 1, "vocab_size": 1, **more})


class MultiHeadAttention(Attention, Part):
    """softmax(q k^T / sqrt(d)) v of every head, each with keys and values of its own."""

    attention_type: ClassVar[str] = "mha"
    _cache: Cache | None = None

    def __init__(
        self, embed_dim: int, num_heads: int, apply_causal_mask: bool = False, use_kv_cache: bool = False
    ) -> None:
        """use_kv_cache: in evaluation mode, causal self-attention keeps keys and values between calls."""
        self._make(embed_dim, num_heads, None, apply_causal_mask, use_kv_cache)

    def _make(
        self, embed_dim: int, num_heads: int, num_groups: int | None, apply_causal_mask: bool, use_kv_cache: bool
    ) -> None:
        heads = kv_heads(self.attention_type, num_heads, num_groups)
        args = _alone(layer_keys(embed_dim, num_heads, heads, None, 1, apply_causal_mask))
        super().__init__(args, args.layer_specs()[0])
        self.embed_dim, self.num_heads, self.num_groups = embed_dim, num_heads, heads
        self.apply_causal_mask, self.use_kv_cache = apply_causal_mask, use_kv_cache
        self.begin(args, Attention.declare(args, args.layer_specs()[0]))

    @classmethod
    def of_layer(cls, args: ModelArgs, spec: LayerSpec, cross: bool = False) -> Self:
        """That of one layer of a model."""
        said: dict[str, Any] = {"num_groups": args.kv_heads} if issubclass(cls, GroupQueryAttention) else {}
        made = cls(embed_dim=args.dim, num_heads=args.n_heads, **said)
        if made.kv_heads != args.kv_heads:
            raise ValueError(
                f"attention={cls.__name__} has {made.kv_heads} heads of keys and values, and the model "
                f"{args.kv_heads}: give attention_type={cls.attention_type}"
            )
        made.layer, made.cross = spec.index, cross
        made.spec = cross_attention(args) if cross else attention_spec(spec)
        made.apply_causal_mask = args.causal and not spec.encoder and not cross
        return made

    def __call__(self, query: Tensor, *given: Any, **named: Any) -> Any:
        """`forward`; a model gives a context after the states, and then the memory of attention to one."""
        if not given or not isinstance(given[0], Context):
            return super().__call__(query, *given, **named)
        ctx, *memory = given
        keys = memory[0] if self.cross and memory else (None if self.cross else query)
        with self.holding(ctx):
            return super().__call__(query, keys, keys)

    def forward(  # type: ignore[override]  # __call__ mends it
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        mask: Tensor | None = None,
        expanding_context: bool = True,
    ) -> Tensor:
        """(B, T, D) of states (B, T, D), and of the states of keys and of values (B, S, D), by default the same.

        mask: 1 where a query sees a key, (T, S) or (B, T, S). With apply_causal_mask query t also sees no key behind
        it; where there are more keys than queries, the queries are the last. expanding_context: whether the cache
        grows; else it keeps as many positions as the first call had. ValueError where shapes do not fit.
        """
        if self.held is not None:
            if not self.cross and key is not query:
                raise ValueError("inside a model self-attention has keys and values of its own states: give (x, x, x)")
            return super().forward(query, self.held, key if self.cross else None)
        key = query if key is None else key
        value = key if value is None else value
        if self.use_kv_cache and not self.training and self.apply_causal_mask and key is query and value is query:
            return self._continued(query, mask, expanding_context)
        for name, states in (("query", query), ("key", key), ("value", value)):
            if states.ndim != 3 or states.shape[-1] != self.embed_dim:
                shape = tuple(states.shape)
                raise ValueError(f"{name} must have shape (B, T, embed_dim={self.embed_dim}); got {shape}")
        q, k, v = (
            w(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for w, x in ((self.wq, query), (self.wk, key), (self.wv, value))
        )
        k, v = (x.repeat_interleave(self.num_heads // self.kv_heads, 1) for x in (k, v))
        seen = mask.unsqueeze(1) if mask is not None and mask.ndim == 3 else mask  # the same for all heads
        if self.apply_causal_mask:
            length, keys = query.shape[1], key.shape[1]
            causal = create_causal_mask(max(length, keys), query.device)[-length:, :keys]
            seen = causal if seen is None else causal * (seen != 0)
        made: Tensor = self.wo(scaled_dot_product_attention(q, k, v, seen).transpose(1, 2).flatten(-2))
        return made

    @torch.no_grad()
    def _continued(self, x_BTD: Tensor, mask: Tensor | None, expanding: bool) -> Tensor:
        """What new states make of those before them, too."""
        if mask is not None:
            raise ValueError("mask: attention with a cache is causal, and takes none")
        held = self._cache
        if held is None or held.next_position is None or len(held.next_position) != len(x_BTD):
            held = self._cache = Cache(self.own_args)
            self._first_length = x_BTD.shape[1]
        held.window = None if expanding else self._first_length
        made = super().forward(x_BTD, self.alone(x_BTD, cache=held))
        held.forget()
        return made

    def reset_cache(self) -> None:
        """Forget the rows of earlier calls."""
        self._cache = None


class MultiQueryAttention(MultiHeadAttention):
    """All heads share one head of keys and values."""

    attention_type = "mqa"


class GroupQueryAttention(MultiHeadAttention):
    """Groups of heads share a head of keys and values: num_groups of these, by default half as many as heads."""

    attention_type = "gqa"

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_groups: int | None = None,
        apply_causal_mask: bool = False,
        use_kv_cache: bool = False,
    ) -> None:
        self._make(embed_dim, num_heads, num_groups, apply_causal_mask, use_kv_cache)


KINDS = {kind.attention_type: kind for kind in (MultiHeadAttention, MultiQueryAttention, GroupQueryAttention)}


def get_attention(
    attention_type: str,
    embed_dim: int,
    num_heads: int,
    num_groups: int | None = None,
    apply_causal_mask: bool = False,
    use_kv_cache: bool = False,
) -> MultiHeadAttention:
    """Attention by the name of its kind: mha, mqa, gqa, of which the last alone has a use for num_groups. ValueError
    for another name."""
    kv_heads(attention_type, num_heads, None)
    if attention_type == "gqa":
        return GroupQueryAttention(embed_dim, num_heads, num_groups, apply_causal_mask, use_kv_cache)
    return KINDS[attention_type](embed_dim, num_heads, apply_causal_mask, use_kv_cache)


class FeedForward(DenseFeedForward, Part):
    """w2 relu(w1 x + b1) + b2."""

    def __init__(self, embed_dim: int, ffn_latent_dim: int) -> None:
        args = _alone(layer_keys(embed_dim, 1, 1, None, ffn_latent_dim, False))
        super().__init__(embed_dim, ffn_latent_dim, args.act, args.gated, args.ffn_bias)
        self.begin(args, feed_forward_rows(args))

    @classmethod
    def of_layer(cls, args: ModelArgs, spec: LayerSpec) -> Self:
        """That of one layer of a model."""
        return cls(embed_dim=args.dim, ffn_latent_dim=args.ffn_width())

    def __call__(self, x: Tensor, *given: Any) -> Any:
        """`forward`; a model gives a context after the states."""
        if not given:
            return super().__call__(x)
        with self.holding(given[0]):
            return super().__call__(x)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # __call__ mends it
        """(..., D) of states (..., D)."""
        return super().forward(x, self.held or Context(shape=(1, 1)))


class MOE(MoE, Part):
    """A mixture of experts with a capacity: each token goes to its topk experts, weighted by the softmax over all,
    divided by their sum where they are several; what finds its expert full goes to one more expert, the overflow
    expert. In training alone: in evaluation experts take all."""

    overflow_rate: float | None = None
    """Share of the assignments of the last call that found their expert full."""

    def __init__(
        self,
        embed_dim: int,
        ffn_latent_dim: int,
        num_experts: int,
        capacity: int | None = None,
        alpha: float = 0.01,
        topk: int = 1,
    ) -> None:
        """capacity: most assignments of a call that an expert takes, counted position by position over all rows; None
        = no limit, and no overflow expert. alpha: of the balance loss, alpha x sum over experts of f p."""
        config = FFNConfig(embed_dim, ffn_latent_dim, True, num_experts, capacity, alpha, topk)
        args = _alone(layer_keys(embed_dim, 1, 1, config, ffn_latent_dim, False))
        moe = MoEArgs.model_validate(moe_keys(ffn_latent_dim, num_experts, capacity, alpha, topk))
        super().__init__(embed_dim, ffn_latent_dim, moe, kind=ExpertKind(args.act, args.gated, args.ffn_bias))
        self.begin(args, moe_rows(args))

    @property
    def bounded(self) -> bool:
        """Whether experts take no more than their capacity: in training mode."""
        return self.moe.capacity is not None and self.training

    def __call__(self, x: Tensor, *given: Any, **named: Any) -> Any:
        """`forward`."""
        return super().__call__(x, *given, **named)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """States (B, T, D), and the balance loss, times alpha: a scalar to add to the loss. mask: (B, T), 1 = token,
        0 = padding, which takes no expert's place and counts nothing."""
        if x.ndim != 3 or x.shape[-1] != self.own_args.dim:
            raise ValueError(f"states must have shape (B, T, embed_dim={self.own_args.dim}); got {tuple(x.shape)}")
        valid_BT = None if mask is None else mask != 0
        n_rows, length, _ = x.shape
        y, stats = super().forward(x, Context(shape=(n_rows, length), valid_BT=valid_BT))
        n_tokens = n_rows * length if valid_BT is None else int(valid_BT.sum())
        self.overflow_rate = overflow_rate([stats])
        return y, stats.balance_sum / max(1, n_tokens)


def overflow_rate(stats: list[RouterStats]) -> float | None:
    """Share of all assignments that found their expert full; None without a capacity."""
    rejected = [int(each.rejected) for each in stats if each.rejected is not None]
    return sum(rejected) / max(1, sum(int(each.expert_counts.sum()) for each in stats)) if rejected else None


class _Layer(Block, Part):
    """A layer whose experts' losses stand beside its result."""

    aux_loss: Tensor | None = None
    """Balance loss of the last call outside of a model, times alpha; None without experts."""
    overflow_rate: float | None = None
    """Of that call, as of MOE."""
    _stats: RouterStats | None = None

    def _make(
        self,
        embed_dim: int,
        num_heads: int,
        ffn_latent_dim: int | None,
        apply_causal_mask: bool,
        attention_type: str,
        ffn_config: FFNConfig | None,
        use_kv_cache: bool,
        num_groups: int | None,
        dropout: float,
        encoder_layers: int,
    ) -> None:
        if ffn_latent_dim is None:
            ffn_latent_dim = 4 * embed_dim if ffn_config is None else ffn_config.latent_dim
        heads = kv_heads(attention_type, num_heads, num_groups)
        keys = layer_keys(embed_dim, num_heads, heads, ffn_config, ffn_latent_dim, apply_causal_mask)
        args = _alone(keys, encoder_layers=encoder_layers, dropout=dropout)
        spec = args.layer_specs()[0]
        super().__init__(args, spec)
        self.use_kv_cache = use_kv_cache
        self.begin(args, Block.declare(args, spec))

    @classmethod
    def of_layer(cls, args: ModelArgs, spec: LayerSpec) -> Self:
        """That of one layer of a model."""
        moe = args.moe
        config = None
        if moe is not None:
            config = FFNConfig(args.dim, args.moe_width(), True, moe.n_experts, moe.capacity, moe.aux_alpha, moe.top_k)
        said: dict[str, Any] = {} if config is None else {"ffn_config": config}
        if args.kv_heads != args.n_heads:
            said |= {"attention_type": "gqa", "num_groups": args.kv_heads}
        latent_dim = args.ffn_width() if moe is None else args.moe_width()
        build: Callable[..., Self] = cls
        made = build(embed_dim=args.dim, num_heads=args.n_heads, ffn_latent_dim=latent_dim, **said)
        made.spec = spec
        for name, module in Block(args, spec).named_children():  # what a place in the model says beside parameters
            if type(getattr(made, name, None)) is type(module):
                setattr(made, name, module)
        for name in ("attention_dropout", "cross_dropout", "ffn_dropout"):
            place = {"attention": "attention", "cross": "cross", "ffn": "feed_forward"}[name.removesuffix("_dropout")]
            setattr(made, name, dropout_at(args.resid_dropout, "residual", f"{spec.unit}.{place}"))
        return made

    def _through(self, x: Tensor, memory: Tensor | None) -> Tensor:
        if self.held is not None:
            given = () if memory is None else (memory,)
            y, self._stats = Block.forward(self, x, self.held, *given)
            return y
        y, stats = Block.forward(self, x, self.alone(x, memory), *(() if memory is None else (memory,)))
        if stats is not None:
            self.aux_loss, self.overflow_rate = stats.balance_sum / (x.shape[0] * x.shape[1]), overflow_rate([stats])
        return y

    def _taken(self) -> RouterStats | None:
        stats, self._stats = self._stats, None
        return stats


class TransformerEncoderLayer(_Layer):
    """norm(x + attention(x)), then norm(x + feed_forward(x))."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        ffn_latent_dim: int | None = None,
        apply_causal_mask: bool = False,
        attention_type: str = "mha",
        ffn_config: FFNConfig | None = None,
        use_kv_cache: bool = False,
        num_groups: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        """ffn_latent_dim: by default ffn_config's, or 4 embed_dim. use_kv_cache: accepted; a layer alone keeps
        nothing."""
        self._make(
            embed_dim, num_heads, ffn_latent_dim, apply_causal_mask, attention_type, ffn_config, use_kv_cache,
            num_groups, dropout, 0,
        )  # fmt: skip

    def __call__(self, x: Tensor, *given: Any) -> Any:
        """`forward`; a model gives a context after the states, and is given what the experts report."""
        if not given:
            return super().__call__(x)
        with self.holding(given[0]):
            return super().__call__(x), self._taken()

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # __call__ mends it
        """States (B, T, D) of states."""
        return self._through(x, None)


class TransformerDecoderLayer(_Layer):
    """norm(x + attention(x)), norm(x + attention(x, memory)), norm(x + feed_forward(x))."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        ffn_latent_dim: int | None = None,
        apply_causal_mask: bool = True,
        attention_type: str = "mha",
        ffn_config: FFNConfig | None = None,
        use_kv_cache: bool = False,
        num_groups: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        """As TransformerEncoderLayer."""
        self._make(
            embed_dim, num_heads, ffn_latent_dim, apply_causal_mask, attention_type, ffn_config, use_kv_cache,
            num_groups, dropout, 1,
        )  # fmt: skip

    def __call__(self, x: Tensor, *given: Any) -> Any:
        """`forward`; a model gives a context before the memory, and is given what the experts report."""
        if not given or not isinstance(given[0], Context):
            return super().__call__(x, *given)
        ctx, memory = given[0], given[1] if len(given) > 1 else None
        with self.holding(ctx):
            return super().__call__(x, memory), self._taken()

    def forward(self, x: Tensor, memory: Tensor | None) -> Tensor:  # type: ignore[override]  # __call__ mends it
        """States (B, T, D) of states, and of what an encoder made, (B, S, D)."""
        return self._through(x, memory)
