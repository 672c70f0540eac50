"""Sparse mixture of experts equals the dense definition, in values and in every gradient."""

import pytest
import torch
import torch.nn.functional as F

from llm.args import MoEArgs
from llm.cache import Cache
from llm.datatypes import TransformerInput
from llm.kernels.grouped import Padding, grouped_matmul
from llm.layers.context import Context
from llm.layers.dispatch import Dispatch
from llm.layers.moe import MoE
from llm.parallel.engine.step import highest_share
from tests.model.models import MOE, llama4, tokens

VARIANTS = {
    "llama 4": dict(),
    "llama 4, top 2": dict(top_k=2),
    "mixtral": dict(top_k=2, score="softmax", apply="output", renorm=True, shared=False),
    "qwen": dict(top_k=3, score="softmax", apply="output", shared=False),
    "switch": dict(top_k=1, score="softmax", apply="output", renorm=True),
    "losses": dict(top_k=2, aux_alpha=0.3, z_alpha=0.2),
}


def layer(dtype=torch.float32, n_experts=5, **changes) -> MoE:
    torch.manual_seed(0)
    moe = MoE(16, 24, MoEArgs(n_experts=n_experts, **changes))
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return moe.to(dtype)


def context(x, valid=None, counts=None) -> Context:
    """Of a layer alone, given x (B, T, D): counts are its experts' in the previous step."""
    return Context(x.shape[:2], valid_BT=valid, expert_counts=None if counts is None else counts[None])


def dense(moe: MoE, x, previous=None):
    """Every expert on every token, the weights of the unchosen 0; and the losses by their definitions."""
    args, x = moe.moe, x.flatten(0, 1)
    logits = x @ moe.router.weight.t()
    p = logits.softmax(-1)
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, logits.topk(args.top_k, dim=-1).indices, True)
    weight = (logits.sigmoid() if args.score == "sigmoid" else p) * chosen
    if args.renorm:
        weight = weight / weight.sum(-1, keepdim=True)
    y = torch.zeros_like(x)
    for e in range(args.n_experts):
        w1, w2, w3 = moe.experts.w1[e], moe.experts.w2[e], moe.experts.w3[e]
        on_input, on_output = (weight[:, e : e + 1], 1) if args.apply == "input" else (1, weight[:, e : e + 1])
        xe = x * on_input
        y = y + (F.silu(xe @ w1) * (xe @ w3)) @ w2 * on_output
    if moe.shared_expert is not None:
        s = moe.shared_expert
        y = y + (F.silu(x @ s.w1.weight.t()) * (x @ s.w3.weight.t())) @ s.w2.weight.t()
    share = torch.full((args.n_experts,), 1 / args.n_experts) if previous is None else previous / previous.sum()
    balance = args.aux_alpha * args.n_experts * (p * share).sum()
    z = args.z_alpha * logits.exp().sum(-1).log().square().sum()
    return y, balance, z, chosen.sum(0)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("known_counts", [False, True])
def test_sparse_equals_dense_in_values_and_gradients(variant, known_counts):
    moe = layer(**variant)
    previous = torch.tensor([7, 0, 3, 9, 1]) if known_counts else None
    x = torch.randn(3, 13, 16, requires_grad=True)
    sparse_y, stats = moe(x, context(x, counts=previous))
    dense_y, balance, z, counts = dense(moe, x, previous)
    # 1e-6 of values of size 1: float32 sums in another order
    close = dict(rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sparse_y.flatten(0, 1), dense_y, **close)
    torch.testing.assert_close((stats.balance_sum, stats.z_sum), (balance, z), **close)
    assert torch.equal(stats.expert_counts, counts)
    upstream = torch.randn_like(dense_y) / 10
    inputs = (x, *moe.parameters())
    ours = torch.autograd.grad((sparse_y.flatten(0, 1) * upstream).sum() + stats.balance_sum + stats.z_sum, inputs)
    theirs = torch.autograd.grad((dense_y * upstream).sum() + balance + z, inputs)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-6 * max(1.0, reference.abs().max().item()))


@pytest.mark.parametrize("apply", ["input", "output"])
def test_the_hand_written_backwards_are_the_derivatives(apply):
    moe = layer(torch.float64, n_experts=3, top_k=2, apply=apply)
    x = torch.randn(1, 4, 16, dtype=torch.float64)
    # weights held fixed: the router computes in float32, too coarse for finite differences
    dispatch = Dispatch.sort(torch.tensor([[0, 2], [2, 0], [0, 2], [2, 0]]), 3, Padding(multiple=16))

    def through_experts(x, w1, w2, w3):
        rows = dispatch.scatter(x)
        hidden = F.silu(grouped_matmul(rows, w1, dispatch.sizes.tolist()))
        hidden = hidden * grouped_matmul(rows, w3, dispatch.sizes.tolist())
        return dispatch.gather(grouped_matmul(hidden, w2, dispatch.sizes.tolist()))

    weights = [w.detach()[:, :4, :4].clone().requires_grad_() for w in (moe.experts.w1, moe.experts.w2, moe.experts.w3)]
    assert torch.autograd.gradcheck(through_experts, (x[0, :, :4].clone().requires_grad_(), *weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_that_do_not_train_pass_on_the_same_gradient_and_make_none_of_their_own(dtype):
    moe, x = layer(dtype), torch.randn(1, 40, 16, dtype=dtype, requires_grad=True)
    (expected,) = torch.autograd.grad(moe(x, context(x))[0].float().sum(), x, retain_graph=True)
    moe.experts.requires_grad_(False)
    moe(x, context(x))[0].float().sum().backward()
    assert torch.equal(x.grad, expected)
    assert all(parameter.grad is None for parameter in moe.experts.parameters())


def test_the_router_learns_from_the_task_and_from_both_losses():
    for changes in (dict(), dict(aux_alpha=0.1), dict(z_alpha=0.1)):
        moe = layer(shared=False, **changes)
        x = torch.randn(1, 6, 16)
        y, stats = moe(x, context(x))
        target = y.sum() if not changes else stats.balance_sum + stats.z_sum
        (gradient,) = torch.autograd.grad(target, moe.router.weight)
        assert gradient.abs().max() > 0


def test_an_unvisited_expert_gets_a_gradient_of_zeros():
    moe = layer()
    x = torch.randn(1, 1, 16)
    moe(x, context(x))[0].sum().backward()
    visited = moe.experts.w1.grad.flatten(1).abs().amax(1) > 0
    assert visited.sum() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("others", [39, 199])
@pytest.mark.parametrize("top_k", [1, 2])
def test_a_tokens_bits_do_not_depend_on_what_others_choose(top_k, others, dtype):
    moe = layer(dtype, n_experts=4, top_k=top_k)
    token = torch.randn(1, 1, 16, dtype=dtype)
    batches = [torch.cat([token, torch.randn(1, others, 16, dtype=dtype)], dim=1) for _ in range(20)]
    results = [moe(x, context(x))[0][:, :1] for x in batches]
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("apply", ["input", "output"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_experts_in_one_product_are_experts_one_by_one(dtype, apply, monkeypatch):
    moe, x = layer(dtype, n_experts=3, top_k=2, apply=apply), torch.randn(1, 300, 16, dtype=dtype, requires_grad=True)
    upstream, products = torch.randn(300, 16), []
    monkeypatch.setattr(torch, "bmm", lambda *args, bmm=torch.bmm, **more: products.append(1) or bmm(*args, **more))

    def run():
        products.clear()
        y, _ = moe(x, context(x))
        return (y, *torch.autograd.grad((y.float().flatten(0, 1) * upstream).sum(), (x, *moe.parameters())))

    together, in_one = run(), len(products)
    monkeypatch.setattr("llm.kernels.grouped.in_one_product", lambda *_: False)
    alone = run()
    assert (in_one, len(products)) == (3 + 6, 0)  # forward and backward; then none
    for a, b in zip(together, alone, strict=True):  # 2**-8 is a rounding of bfloat16; each goes through a few
        assert (a - b).float().norm() <= 2**-8 * b.float().norm()


def test_rows_are_padded_to_the_busiest_experts_only_within_a_limit():
    expert, padding = torch.tensor([0] * 20 + [1] * 17 + [2] * 40).unsqueeze(1), Padding(multiple=16, even=True)
    assert Dispatch.sort(expert, 4, padding).sizes.tolist() == [32, 32, 48, 0]  # even, there were 192 for 112
    even = Dispatch.sort(expert, 3, padding)
    assert even.sizes.tolist() == [48, 48, 48]
    assert torch.equal(even.pair_of_row[even.row_of_pair], torch.arange(77))
    assert len(even.padding) == 3 * 48 - 77
    x = torch.randn(77, 2)
    assert torch.equal(even.gather(even.scatter(x)), x)


def test_values_and_gradients_are_the_same_bits_every_time():
    moe, x = layer(top_k=3, aux_alpha=0.1), torch.randn(2, 50, 16, requires_grad=True)

    def run():
        y, stats = moe(x, context(x))
        return (y, *torch.autograd.grad(y.square().sum() + stats.balance_sum, (x, *moe.parameters())))

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize(
    "padding, sizes",
    [
        (Padding(), (2, 0, 2, 2)),
        (Padding(multiple=16), (16, 0, 16, 16)),
        (Padding(least=9), (9, 0, 9, 9)),
        (Padding(least=9, together=8), (9, 0, 9, 14)),
    ],
)
def test_dispatch_sorts_pairs_by_expert_in_order_of_tokens(padding, sizes):
    expert = torch.tensor([[2, 0], [0, 3], [2, 3]])
    dispatch = Dispatch.sort(expert, 4, padding)
    assert dispatch.counts.tolist() == [2, 0, 2, 2]
    assert dispatch.sizes.tolist() == list(sizes)
    by_expert = [rows.tolist() for rows in dispatch.pair_of_row.split(dispatch.sizes.tolist())]
    assert [rows[:2] for rows in by_expert] == [[1, 2], [], [0, 4], [3, 5]]
    assert torch.equal(dispatch.pair_of_row[dispatch.row_of_pair], torch.arange(6))


def test_losses_of_cuts_add_up_to_the_whole():
    model, ids = llama4(moe=MOE | dict(aux_alpha=0.1, z_alpha=0.01)), tokens(4, 16)
    previous = torch.randint(1, 50, (4, 4))
    whole, *parts = (model(part, expert_counts=previous) for part in (ids, *ids.split(1)))
    for name in ("balance_sum", "z_sum", "expert_counts"):
        total = sum(getattr(part, name) for part in parts)
        torch.testing.assert_close(getattr(whole, name), total, rtol=1e-5, atol=0)


def test_a_balanced_router_costs_alpha_per_token_and_layer():
    model, ids = llama4(moe=MOE | dict(aux_alpha=0.1)), tokens(2, 8)
    # unknown counts are uniform, and then the loss is alpha whatever the router does
    torch.testing.assert_close(model(ids).balance_sum, torch.tensor(0.1 * 16 * 4))


def test_each_layer_reads_its_own_row_of_the_previous_steps_counts():
    model = llama4(moe=MOE | dict(interleave=2, aux_alpha=0.1))
    assert [layer.number for layer in model.moe_layers()] == [0, 1]
    counts = torch.arange(8).view(2, 4)
    out, other = model(tokens(2, 8), expert_counts=counts), model(tokens(2, 8), expert_counts=counts.flip(0))
    assert out.expert_counts.sum(1).tolist() == [16, 16]
    assert out.balance_sum != other.balance_sum
    assert not list(model.buffers())
    with pytest.raises(ValueError, match=r"must have shape \(2, 4\)"):
        model(tokens(2, 8), expert_counts=counts[:1])


def test_expert_load_is_the_highest_share_of_any_layer_over_an_even_one():
    counts = torch.tensor([[4, 4, 4, 4], [8, 2, 6, 0]])
    assert highest_share(counts) == 2.0  # 8 tokens, where 4 were even
    assert highest_share(counts.unflatten(1, (2, -1)).sum(-1)) == 10 / 8  # two ranks with two experts each
    assert highest_share(torch.zeros(2, 4, dtype=torch.int64)) == 0.0


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_padding_counts_in_no_statistic_of_a_layer(variant):
    moe, x = layer(**(variant | dict(aux_alpha=0.3, z_alpha=0.2))), torch.randn(3, 7, 16)
    previous = torch.tensor([7, 0, 3, 9, 1])
    valid = torch.rand(3, 7) > 0.4
    unpadded = x[valid].unsqueeze(0)
    _, padded = moe(x, context(x, valid, previous))
    _, alone = moe(unpadded, context(unpadded, counts=previous))
    assert torch.equal(padded.expert_counts, alone.expert_counts)
    ours, theirs = (
        (stats.balance_sum, stats.z_sum, *torch.autograd.grad(stats.balance_sum + stats.z_sum, moe.router.weight))
        for stats in (padded, alone)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # float32 sums in another order


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("cached", [False, True])
def test_router_losses_and_counts_of_padded_rows_are_those_of_the_rows_alone(side, cached):
    model, ids, lengths = llama4(moe=MOE | dict(top_k=2, aux_alpha=0.1, z_alpha=0.01)), tokens(3, 24), [5, 24, 1]
    previous = torch.randint(1, 50, (4, 4))
    width = 26
    batch, positions = torch.zeros(3, width, dtype=torch.int64), torch.full((3, width), -1)
    for row, n in enumerate(lengths):
        low = {"left": width - n, "right": 0, "both": (width - n) // 2}[side]
        batch[row, low : low + n], positions[row, low : low + n] = ids[row, :n], torch.arange(n)
    whole = model(
        TransformerInput(batch, tokens_position=positions),
        cache=Cache(model.args) if cached else None,
        return_hidden=True,
        expert_counts=previous,
    )
    parts = [
        model(ids[row : row + 1, :n], return_hidden=True, expert_counts=previous) for row, n in enumerate(lengths)
    ]
    assert torch.equal(whole.expert_counts, sum(part.expert_counts for part in parts))
    assert whole.expert_counts.sum() == sum(lengths) * 2 * 4  # two experts a token in each of four layers
    for name in ("balance_sum", "z_sum"):
        # float32 sums in another order
        torch.testing.assert_close(getattr(whole, name), sum(getattr(part, name) for part in parts), rtol=1e-5, atol=0)
