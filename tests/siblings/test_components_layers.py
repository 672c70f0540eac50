"""Transformer Components' parts alone: attention and layers against torch's, the mixture of experts against a loop, the
functions against their formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.siblings.components import (
    MOE,
    FeedForward,
    FFNConfig,
    GroupQueryAttention,
    MultiHeadAttention,
    MultiQueryAttention,
    PositionalEncoding,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
    create_causal_mask,
    get_attention,
    scaled_dot_product_attention,
)

CLOSE = dict(rtol=1e-5, atol=1e-5)
"""float32 sums in another order, of values of size 1."""


def states(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spread(module: nn.Module) -> nn.Module:
    """Parameters large enough that every path matters, biases and norms too."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.1, 0.3, generator=generator)
    return module


def into_torch(theirs: nn.MultiheadAttention, ours: MultiHeadAttention) -> None:
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([w.weight for w in (ours.wq, ours.wk, ours.wv)]))
        theirs.in_proj_bias.copy_(torch.cat([w.bias for w in (ours.wq, ours.wk, ours.wv)]))
        theirs.out_proj.weight.copy_(ours.wo.weight)
        theirs.out_proj.bias.copy_(ours.wo.bias)


def layer_into_torch(theirs: nn.Module, ours: nn.Module) -> nn.Module:
    """torch's layer with the values of ours."""
    into_torch(theirs.self_attn, ours.attention)
    norms = {"norm1": ours.attention_post_norm, "norm2": ours.ffn_post_norm}
    if isinstance(theirs, nn.TransformerDecoderLayer):
        into_torch(theirs.multihead_attn, ours.cross)
        norms = {"norm1": ours.attention_post_norm, "norm2": ours.cross_post_norm, "norm3": ours.ffn_post_norm}
    for name, norm in norms.items():
        getattr(theirs, name).load_state_dict(norm.state_dict())
    theirs.linear1.load_state_dict(ours.feed_forward.w1.state_dict())
    theirs.linear2.load_state_dict(ours.feed_forward.w2.state_dict())
    return theirs


def test_the_causal_mask_is_lower_triangular():
    assert torch.equal(create_causal_mask(4), torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]))


@pytest.mark.parametrize("kind", [torch.float32, torch.bool, torch.int64])
def test_attention_of_given_heads_is_torchs_and_a_query_that_sees_nothing_gets_zero(kind):
    q, k, v = states(2, 3, 5, 8), states(2, 3, 7, 8, seed=1), states(2, 3, 7, 8, seed=2)
    mask = torch.rand(5, 7, generator=torch.Generator().manual_seed(3)) > 0.4
    mask[2] = False
    found = scaled_dot_product_attention(q, k, v, mask=mask.to(kind))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    kept = [0, 1, 3, 4]
    torch.testing.assert_close(found[:, :, kept], expected[:, :, kept], **CLOSE)
    assert not found[:, :, 2].any()
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v), F.scaled_dot_product_attention(q, k, v), **CLOSE)


def test_a_mask_of_other_numbers_is_refused():
    with pytest.raises(ValueError, match="1 where a query sees a key and 0 elsewhere"):
        scaled_dot_product_attention(states(2, 3, 4), states(2, 3, 4), states(2, 3, 4), mask=torch.full((3, 3), -1e9))


def test_positions_are_added_as_sines_at_even_and_cosines_at_odd_places():
    encoding, x = PositionalEncoding(6, max_seq_len=4), torch.zeros(1, 9, 6)
    expected = [
        [math.sin(p / 10000 ** (i / 6)) if i % 2 == 0 else math.cos(p / 10000 ** ((i - 1) / 6)) for i in range(6)]
        for p in range(9)
    ]
    torch.testing.assert_close(encoding(x)[0], torch.tensor(expected), **CLOSE)
    torch.testing.assert_close(encoding(x[:, :2], start=7)[0], torch.tensor(expected[7:]), **CLOSE)
    assert not list(encoding.parameters())


@pytest.mark.parametrize("causal", [False, True])
def test_multi_head_attention_is_torchs(causal):
    ours = spread(MultiHeadAttention(16, 4, apply_causal_mask=causal))
    theirs = nn.MultiheadAttention(16, 4, batch_first=True)
    into_torch(theirs, ours)
    x, y, z = states(2, 5, 16), states(2, 5, 16, seed=1), states(2, 5, 16, seed=2)
    mask = create_causal_mask(5) == 0 if causal else None
    for given in ((x, x, x), (x, y, y), (x, y, z)):
        torch.testing.assert_close(ours(*given), theirs(*given, attn_mask=mask)[0], **CLOSE)
    torch.testing.assert_close(ours(x), ours(x, x, x))


def test_a_mask_and_the_causal_one_hold_together():
    ours, x = spread(MultiHeadAttention(16, 4, apply_causal_mask=True)), states(2, 5, 16)
    mask = torch.ones(2, 5, 5)
    mask[:, :, 1] = 0
    changed = x.clone()
    changed[:, 1] += 1
    first, second = ours(x, mask=mask), ours(changed, mask=mask)
    torch.testing.assert_close(first[:, 2:], second[:, 2:], **CLOSE)


@pytest.mark.parametrize(("groups", "kind"), [(1, MultiQueryAttention), (8, MultiHeadAttention)])
def test_one_group_is_one_head_and_as_many_as_heads_are_all(groups, kind):
    grouped, other = GroupQueryAttention(16, 8, num_groups=groups), kind(16, 8)
    other.load_state_dict(grouped.state_dict())
    x = states(2, 5, 16)
    torch.testing.assert_close(grouped(x, x, x), other(x, x, x))


def test_groups_are_half_as_many_as_heads_where_none_are_given_and_one_at_least():
    assert GroupQueryAttention(16, 8).num_groups == 4 and GroupQueryAttention(16, 1).num_groups == 1
    assert get_attention("gqa", 16, 8).wk.weight.shape == (8, 16)


@pytest.mark.parametrize(("name", "kind"), [("mha", MultiHeadAttention), ("mqa", MultiQueryAttention)])
def test_the_factory_has_no_use_for_groups_of_other_kinds(name, kind):
    made = get_attention(name, embed_dim=16, num_heads=8, num_groups=3, apply_causal_mask=True, use_kv_cache=True)
    assert type(made) is kind and made.apply_causal_mask and made.use_kv_cache


@pytest.mark.parametrize("name", ["mha", "mqa", "gqa"])
def test_attention_with_a_cache_is_attention_to_the_whole_row(name):
    attention, x = get_attention(name, 16, 4, apply_causal_mask=True, use_kv_cache=True).eval(), states(2, 9, 16)
    whole = get_attention(name, 16, 4, apply_causal_mask=True)
    whole.load_state_dict(attention.state_dict())
    found = torch.cat([attention(part, part, part) for part in x.split([4, 1, 3, 1], dim=1)], dim=1)
    torch.testing.assert_close(found, whole(x, x, x), **CLOSE)
    attention.reset_cache()
    torch.testing.assert_close(attention(x, x, x), found, **CLOSE)
    attention.train()
    torch.testing.assert_close(attention(x, x, x), found, **CLOSE)  # training sees whole rows


def test_the_feed_forward_is_two_matrices_with_a_relu_between():
    made, x = spread(FeedForward(16, 24)), states(2, 5, 16)
    expected = F.linear(F.linear(x, made.w1.weight, made.w1.bias).relu(), made.w2.weight, made.w2.bias)
    torch.testing.assert_close(made(x), expected, **CLOSE)


def test_an_encoder_layer_is_torchs():
    ours = spread(TransformerEncoderLayer(16, 4, 24))
    theirs = layer_into_torch(nn.TransformerEncoderLayer(16, 4, 24, 0.0, batch_first=True), ours)
    x = states(2, 7, 16)
    torch.testing.assert_close(ours(x), theirs(x), **CLOSE)


def test_a_causal_encoder_layer_is_torchs_with_a_mask():
    ours = spread(TransformerEncoderLayer(16, 4, 24, apply_causal_mask=True))
    theirs = layer_into_torch(nn.TransformerEncoderLayer(16, 4, 24, 0.0, batch_first=True), ours)
    x = states(2, 7, 16)
    torch.testing.assert_close(ours(x), theirs(x, src_mask=create_causal_mask(7) == 0), **CLOSE)


@pytest.mark.parametrize("causal", [True, False])
def test_a_decoder_layer_is_torchs(causal):
    ours = spread(TransformerDecoderLayer(16, 4, 24, apply_causal_mask=causal))
    theirs = layer_into_torch(nn.TransformerDecoderLayer(16, 4, 24, 0.0, batch_first=True), ours)
    x, memory = states(2, 7, 16), states(2, 5, 16, seed=1)
    mask = create_causal_mask(7) == 0 if causal else None
    torch.testing.assert_close(ours(x, memory), theirs(x, memory, tgt_mask=mask), **CLOSE)


def expert(moe: MOE, e: int | None, x: Tensor) -> Tensor:
    if e is None:
        return moe.overflow_expert.w2(moe.overflow_expert.w1(x).relu())
    experts = moe.experts
    return (x @ experts.w1[e] + experts.b1[e]).relu() @ experts.w2[e] + experts.b2[e]


@pytest.mark.parametrize(("topk", "capacity"), [(1, 3), (2, 4), (2, 100), (1, None)])
def test_experts_with_a_capacity_equal_a_loop_position_by_position(topk, capacity):
    moe, x = spread(MOE(16, 24, num_experts=4, capacity=capacity, alpha=0.01, topk=topk)), states(3, 6, 16)
    output, aux_loss = moe(x)
    taken, rejected, expected = [0] * 4, 0, torch.zeros(3, 6, 16)
    p = F.linear(x, moe.router.weight).softmax(-1)
    counts = torch.zeros(4)
    for t in range(6):
        for b in range(3):
            weights, chosen = p[b, t].topk(topk)
            weights = weights / weights.sum() if topk > 1 else weights
            for weight, e in zip(weights, chosen.tolist(), strict=True):
                full = capacity is not None and taken[e] >= capacity
                taken[e] += 1
                rejected += full
                counts[e] += 1
                expected[b, t] += weight * expert(moe, None if full else e, x[b, t])
    torch.testing.assert_close(output, expected, **CLOSE)
    torch.testing.assert_close(aux_loss, 0.01 * (counts / counts.sum() * p.mean((0, 1))).sum(), **CLOSE)
    assert moe.overflow_rate == (None if capacity is None else rejected / (18 * topk))
    assert (capacity in (3, 4)) == bool(rejected)


def test_in_evaluation_experts_take_all():
    moe, x = spread(MOE(16, 24, num_experts=4, capacity=1, topk=2)), states(2, 6, 16)
    free = MOE(16, 24, num_experts=4, topk=2)
    free.load_state_dict(moe.state_dict(), strict=False)
    assert not torch.allclose(moe(x)[0], free(x)[0])
    torch.testing.assert_close(moe.eval()(x)[0], free(x)[0])
    assert moe.overflow_rate == 0


def test_the_router_of_one_expert_a_token_learns_from_the_task():
    moe = spread(MOE(16, 24, num_experts=4, capacity=8, topk=1))
    moe(states(2, 6, 16))[0].sum().backward()
    assert moe.router.weight.grad.abs().max() > 0


def test_padding_takes_no_place_of_an_expert():
    moe, x = spread(MOE(16, 24, num_experts=4, capacity=2)), states(1, 8, 16)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]])
    padded, aux_loss = moe(x, mask=mask)
    alone, of_tokens = moe(x[:, :5])
    torch.testing.assert_close(padded[:, :5], alone, **CLOSE)
    torch.testing.assert_close(aux_loss, of_tokens, **CLOSE)


def test_a_layer_with_experts_keeps_their_loss_beside_its_result():
    layer = TransformerEncoderLayer(16, 4, ffn_config=FFNConfig(16, 24, True, 4, capacity=3, topk=2))
    y = layer(states(2, 6, 16))
    assert y.shape == (2, 6, 16) and layer.aux_loss.requires_grad and 0 < layer.overflow_rate < 1


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: MultiHeadAttention(16, 3), "num_heads=3 does not divide embed_dim=16"),
        (lambda: GroupQueryAttention(16, 4, num_groups=3), "num_groups=3 does not divide num_heads=4"),
        (lambda: get_attention("linear", 16, 4), "attention_type='linear' is not known; use mha, mqa, gqa"),
        (lambda: FFNConfig(16, 24, use_moe=True), "num_experts=None: expected a whole number, 1 or more"),
        (lambda: FFNConfig(16, 0), "latent_dim=0: expected a whole number"),
        (lambda: MOE(16, 24, 2, topk=3), "topk=3 exceeds num_experts=2"),
        (lambda: MOE(16, 24, 2, capacity=0), "capacity=0: expected a whole number"),
        (lambda: MOE(16, 24, 2, alpha=-1.0), "alpha=-1.0: expected a number, 0 or more"),
        (lambda: MultiHeadAttention(16, 4)(states(5, 16)), r"query must have shape \(B, T, embed_dim=16\); got \(5,"),
        (lambda: TransformerEncoderLayer(16, 4)(states(2, 5, 8)), r"states must have shape \(B, T, embed_dim=16\)"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(make, said):
    with pytest.raises(ValueError, match=said):
        make()
