"""Experts with a capacity: which assignments are admitted, what the others become, and what is reported; all against
loops that go through the assignments one by one."""

import pytest
import torch
import torch.nn.functional as F

from llm.args import MoEArgs
from llm.batch import Counts
from llm.datatypes import RouterStats
from llm.layers.capacity import rejected
from llm.layers.moe import SWIGLU, ExpertKind, MoE
from llm.objectives import NextToken, Objectives
from llm.parallel.engine.step import Tally
from llm.parallel.launch.world import World
from tests.layers.test_moe import VARIANTS, context
from tests.model.models import MOE, llama4, tokens

PLAIN = ExpertKind("relu", gated=False, bias=True)


def layer(kind=SWIGLU, **changes) -> MoE:
    torch.manual_seed(0)
    moe = MoE(16, 24, MoEArgs(n_experts=4, **changes), kind=kind)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return moe


def one_by_one(expert_BTk, valid_BT, capacity, scope):
    """Each assignment in its order, as a door would count."""
    n_rows, length, k = expert_BTk.shape
    found = torch.zeros_like(expert_BTk, dtype=torch.bool)
    taken = {}
    for t in range(length):
        for b in range(n_rows):
            for slot in range(k):
                if not valid_BT[b, t]:
                    continue
                queue = int(expert_BTk[b, t, slot]), b if scope == "row" else None
                found[b, t, slot] = taken.get(queue, 0) >= capacity
                taken[queue] = taken.get(queue, 0) + 1
    return found


@pytest.mark.parametrize("scope", ["row", "call"])
@pytest.mark.parametrize("capacity", [1, 3, 5, 100])
def test_assignments_are_admitted_by_position_and_padding_takes_no_place(scope, capacity):
    generator = torch.Generator().manual_seed(capacity)
    expert_BTk = torch.rand(3, 7, 4, generator=generator).topk(2).indices
    valid_BT = torch.rand(3, 7, generator=generator) > 0.2
    moe = MoEArgs(n_experts=4, top_k=2, capacity=capacity, capacity_scope=scope)
    found = rejected(expert_BTk.flatten(0, 1), valid_BT.flatten(), (3, 7), moe)
    assert torch.equal(found.view(3, 7, 2), one_by_one(expert_BTk, valid_BT, capacity, scope))


def expert(moe: MoE, e: int | None, x):
    """What an expert makes of x; the overflow expert of None."""
    kind, act = moe.experts.kind, getattr(F, moe.experts.kind.act)
    if e is None:
        o = moe.overflow_expert
        w1, w2 = o.w1.weight.t(), o.w2.weight.t()
        w3 = None if o.w3 is None else o.w3.weight.t()
        b1, b2, b3 = o.w1.bias, o.w2.bias, None if o.w3 is None else o.w3.bias
    else:
        o = moe.experts
        w1, w2, w3 = o.w1[e], o.w2[e], o.w3[e] if kind.gated else None
        b1, b2, b3 = (None if b is None else b[e] for b in (o.b1, o.b2, o.b3))
    hidden = act(x @ w1 + (0 if b1 is None else b1))
    if w3 is not None:
        hidden = hidden * (x @ w3 + (0 if b3 is None else b3))
    return hidden @ w2 + (0 if b2 is None else b2)


def slow(moe: MoE, x, full_BTk):
    """Token after token, choice after choice; `full_BTk` says which choices find their expert full."""
    args, rows = moe.moe, []
    for x_D, full_k in zip(x.flatten(0, 1), full_BTk.flatten(0, 1), strict=True):
        logits = moe.router.weight @ x_D
        chosen, experts = logits.topk(args.top_k)
        weights = chosen.sigmoid() if args.score == "sigmoid" else logits.softmax(-1)[experts]
        weights = weights / weights.sum() if args.renorm else weights
        y, left = torch.zeros_like(x_D), torch.zeros(())
        for weight, e, full in zip(weights, experts.tolist(), full_k.tolist(), strict=True):
            if full:
                left = left + weight
            else:
                y = y + (expert(moe, e, weight * x_D) if args.apply == "input" else weight * expert(moe, e, x_D))
        if args.overflow and full_k.any():
            y = y + (expert(moe, None, left * x_D) if args.apply == "input" else left * expert(moe, None, x_D))
        if moe.shared_expert is not None:
            s = moe.shared_expert
            gate = getattr(F, moe.experts.kind.act)(s.w1(x_D))
            y = y + s.w2(gate if s.w3 is None else gate * s.w3(x_D))
        rows.append(y)
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("overflow", [False, True], ids=["dropped", "overflow expert"])
@pytest.mark.parametrize("kind", [SWIGLU, PLAIN], ids=["swiglu", "relu with biases"])
def test_values_and_gradients_equal_a_loop_over_tokens(variant, overflow, kind):
    moe = layer(kind, capacity=2, overflow=overflow, **variant)
    x = torch.randn(2, 9, 16, requires_grad=True)
    y, stats = moe(x, context(x))
    experts = (x @ moe.router.weight.t()).topk(moe.moe.top_k).indices
    full = one_by_one(experts, torch.ones(2, 9, dtype=torch.bool), 2, "row")
    expected = slow(moe, x, full)
    # float32 sums in another order, of values of size 1
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert int(stats.rejected) == int(full.sum()) > 0
    assert int(stats.expert_counts.sum()) == full.numel(), "what found no place was chosen all the same"
    upstream = torch.randn_like(y) / 10
    inputs = (x, *moe.parameters())
    ours, theirs = (torch.autograd.grad((z * upstream).sum(), inputs) for z in (y, expected))
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5 * max(1.0, reference.abs().max().item()))


def test_the_scope_of_a_call_counts_over_all_rows():
    moe = layer(capacity=3, capacity_scope="call", top_k=2, apply="output", score="softmax", shared=False)
    x = torch.randn(2, 5, 16)
    experts = (x @ moe.router.weight.t()).topk(2).indices
    full = one_by_one(experts, torch.ones(2, 5, dtype=torch.bool), 3, "call")
    y, stats = moe(x, context(x))
    torch.testing.assert_close(y, slow(moe, x, full), rtol=1e-5, atol=1e-5)
    assert int(stats.rejected) == int(full.sum())


def test_a_row_is_the_same_whatever_rows_are_beside_it():
    moe, x = layer(capacity=2, overflow=True), torch.randn(3, 11, 16)
    together = moe(x, context(x))[0]
    alone = torch.cat([moe(row, context(row))[0] for row in x.split(1)])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)  # products of other sizes


def test_no_token_depends_on_a_later_one():
    moe, x = layer(capacity=2, overflow=True), torch.randn(1, 12, 16)
    changed = torch.cat([x[:, :8], torch.randn(1, 4, 16)], dim=1)
    first, second = (moe(z, context(z))[0][:, :8] for z in (x, changed))
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)  # products of other sizes


@pytest.mark.parametrize("how", ["evaluation", "no gradients"])
def test_outside_of_training_experts_take_all(how):
    moe, x = layer(capacity=1, overflow=True), torch.randn(1, 12, 16)
    moe.train(how != "evaluation")
    with torch.set_grad_enabled(how == "evaluation"):
        y, stats = moe(x, context(x))
    torch.testing.assert_close(y, slow(moe, x, torch.zeros(1, 12, 1, dtype=torch.bool)), rtol=1e-5, atol=1e-5)
    assert int(stats.rejected) == 0


def test_padding_goes_to_no_expert_overflows_nowhere_and_counts_nothing():
    moe, x = layer(capacity=2, overflow=True, shared=False), torch.randn(1, 10, 16)
    valid = torch.tensor([[True] * 6 + [False] * 4])
    padded, stats = moe(x, context(x, valid))
    alone, of_tokens = moe(x[:, :6], context(x[:, :6]))
    torch.testing.assert_close(padded[:, :6], alone, rtol=1e-6, atol=1e-6)  # products of other sizes
    assert not padded[:, 6:].any()
    assert torch.equal(stats.rejected, of_tokens.rejected) and torch.equal(stats.expert_counts, of_tokens.expert_counts)


def test_the_balance_loss_leaves_out_the_number_of_experts_where_its_key_says_so():
    x, previous = torch.randn(2, 9, 16), torch.tensor([3, 9, 1, 5])
    layers = (layer(aux_alpha=0.1, aux_times_experts=on) for on in (True, False))
    with_factor, without = (moe(x, context(x, counts=previous))[1].balance_sum for moe in layers)
    torch.testing.assert_close(with_factor, 4 * without)


def test_the_balance_loss_of_a_call_compares_with_its_own_counts():
    moe = layer(aux_alpha=0.01, aux_times_experts=False, balance="call", top_k=2, score="softmax")
    x = torch.randn(2, 9, 16)
    stats = moe(x, context(x))[1]
    p = (x @ moe.router.weight.t()).softmax(-1).mean((0, 1))
    f = stats.expert_counts / stats.expert_counts.sum()
    torch.testing.assert_close(stats.balance_sum / 18, 0.01 * (f * p).sum())


def test_without_a_capacity_nothing_is_reported_and_nothing_is_added_to_what_is_written():
    moe, x = layer(), torch.randn(1, 3, 16)
    stats = moe(x, context(x))[1]
    assert stats.rejected is None and RouterStats.together([stats, stats]).rejected is None
    new = {"capacity", "capacity_scope", "overflow", "aux_times_experts", "swiglu"}
    assert not new & MoEArgs(n_experts=4).model_dump().keys()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(overflow=True), "model.moe.overflow=true needs model.moe.capacity"),
        (dict(capacity_scope="call"), "model.moe.capacity_scope=call needs model.moe.capacity"),
    ],
)
def test_what_needs_a_capacity_is_refused_without(changes, named):
    with pytest.raises(ValueError, match=named):
        MoEArgs(n_experts=4, **changes)


def test_a_model_reports_what_all_its_layers_reject_and_decodes_without_a_limit():
    model = llama4(moe=MOE | dict(capacity=2, overflow=True))
    ids = tokens(2, 12)
    trained = model.train()(ids)
    assert 0 < int(trained.rejected) < int(trained.expert_counts.sum())
    assert any("overflow_expert" in name for name, _ in model.named_parameters())
    evaluated = model.eval()(ids)
    assert int(evaluated.rejected) == 0
    assert not torch.equal(evaluated.logits, trained.logits)


def test_a_step_reports_the_share_of_the_counts_of_all_its_micro_batches():
    model = llama4(moe=MOE | dict(capacity=2, overflow=True)).train()
    objectives, rows, alone = Objectives([NextToken("lm")]), tokens(4, 12), World(0, 1, 0, torch.device("cpu"))
    counts = Counts(48, 48, {"lm": 48}, {})
    tally = Tally(model.args, objectives, counts, alone)
    outs = [model(part) for part in rows.split(2)]
    for out in outs:
        tally.add_routing(out.router)
    of_parts = sum(int(out.rejected) for out in outs)
    assert tally.result(1.0, 1).moe_overflow == of_parts / (48 * len(model.moe_layers()))
    assert int(model(rows).rejected) == of_parts, "however rows are cut"
    assert Tally(llama4(moe=MOE).args, objectives, counts, alone).result(1.0, 1).moe_overflow is None
