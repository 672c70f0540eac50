"""Surgery keeps the function of a model where it says so, refuses where it cannot, and what it makes can learn."""

import math

import pytest
import torch

from llm import LLM, ModelArgs
from llm.args import MoEArgs
from llm.errors import UserError
from llm.surgery import build, deepen, enlarge_vocabulary, to_nope, upcycle
from tests.model.models import MOE, VOCAB, llama4, tokens

PLAIN = dict(dim=48, n_layers=4, n_heads=4, n_kv_heads=2, vocab_size=VOCAB, ffn_hidden=64, init_std=0.1)
ARCHS = {
    "llama": PLAIN,
    "tied, biases": PLAIN | dict(tie_embeddings=True, qkv_bias=True, o_bias=True),
    "gemma 2": PLAIN | dict(
        norm_place="sandwich", norm_offset=True, tie_embeddings=True, sliding_window=6, embed_scale=6.9,
        layer_pattern=["attn:window", "attn:full"], attn_softcap=20.0, logit_softcap=10.0, act="gelu_tanh",
    ),
    "olmo 2": PLAIN | dict(norm_place="post", norm_fp32_weight=True, qk_norm="full"),
    "neox": PLAIN | dict(
        norm="layer", parallel_residual=True, act="gelu", gated=False, ffn_bias=True, qkv_bias=True, o_bias=True,
        rope_pct=0.5,
    ),
    "layer norms after": PLAIN | dict(norm="layer", norm_place="post"),
    "mixture": PLAIN | dict(moe=MOE | dict(interleave=2)),
}  # fmt: skip
DENSE = ["llama", "tied, biases", "olmo 2"]
H = PLAIN["ffn_hidden"]


def trained(**args) -> LLM:
    """A model none of whose parameters has the value that it begins with."""
    model = LLM(ModelArgs.model_validate(args)).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def logits(model: LLM) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens(3, 21)).logits


def assert_same_function(before: LLM, after: LLM) -> None:
    """Up to the rounding of float32 sums in another order."""
    expected, found = logits(before), logits(after)
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


def assert_learns(model: LLM, names: list[str]) -> None:
    """After some steps every one of these parameters has changed, and the loss is lower."""
    model.train()
    begin = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = tokens(4, 17)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03)
    losses = []
    for _ in range(4):
        out = model(rows[:, :-1], labels=rows[:, 1:].contiguous())
        loss = out.loss_sum / out.n_targets
        if out.balance_sum is not None:
            loss = loss + (out.balance_sum + out.z_sum) / out.n_targets
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    stuck = [name for name in names if torch.equal(begin[name], dict(model.named_parameters())[name])]
    assert not stuck


SPLITS = {
    "llama 4: shared": (dict(), None),
    "llama 4: shared, wider": (dict(hidden=80, top_k=2), None),
    "switch with renorm": (dict(score="softmax", renorm=True, shared=False), None),
    "sigmoid, renorm, top 1, on the input": (dict(renorm=True, shared=False), None),
    "mixtral": (dict(top_k=2, score="softmax", apply="output", renorm=True, shared=False), None),
    "mixtral, wider": (dict(hidden=72, top_k=2, score="softmax", apply="output", renorm=True, shared=False), None),
    "all experts": (dict(top_k=4, score="softmax", apply="output", shared=False), None),
    "sigmoid, renorm": (dict(top_k=3, apply="output", renorm=True, shared=False), None),
    "half shared, half routed": (
        dict(hidden=40, top_k=2, score="softmax", apply="output", renorm=True, shared=True), None,
    ),
    "fine-grained": (
        dict(n_experts=8, top_k=4, hidden=32, score="softmax", apply="output", renorm=True, shared=False), None,
    ),
    "fine-grained, uneven, shared": (
        dict(n_experts=9, top_k=6, hidden=18, score="sigmoid", apply="output", renorm=True), None,
    ),
    "fine-grained, on the input": (
        dict(n_experts=8, top_k=4, hidden=16, score="softmax", renorm=True, shared=False), None,
    ),
    "fine-grained without room for a whole one": (
        dict(n_experts=8, top_k=4, hidden=32, score="softmax", apply="output", shared=False), "model.moe.renorm=False",
    ),
    "switch": (dict(score="softmax", apply="output", shared=False), "model.moe.renorm=False"),
    "sigmoid without shared": (dict(shared=False), "model.moe.renorm=False"),
    "mixtral on the input": (dict(top_k=2, score="softmax", renorm=True, shared=False), "model.moe.apply=input"),
    "a shared expert too narrow": (dict(hidden=40), "model.moe.renorm=False"),
    "an overflow expert": (dict(capacity=3, overflow=True), "model.moe.overflow: the dense feed-forward"),
    "no swiglu": (dict(swiglu=False), "model.moe.swiglu=false: the dense feed-forward"),
    "top_k not of groups": (
        dict(n_experts=8, top_k=3, hidden=32, apply="output", renorm=True, shared=False), "model.moe.top_k=3",
    ),
    "n_experts not of groups": (
        dict(n_experts=7, top_k=2, hidden=32, apply="output", renorm=True, shared=False), "model.moe.n_experts=7",
    ),
}  # fmt: skip
EXACT = {name: changes for name, (changes, refusal) in SPLITS.items() if refusal is None}
REFUSED = {name: both for name, both in SPLITS.items() if both[1] is not None}


@pytest.mark.parametrize("changes", EXACT.values(), ids=EXACT)
def test_upcycling_keeps_the_function(changes):
    before = trained(**PLAIN)
    after = build(*upcycle(before.args, before.state_dict(), MoEArgs(**dict(n_experts=4) | changes), seed=3))
    assert [spec.ffn for spec in after.specs] == ["moe"] * 4
    assert_same_function(before, after)


@pytest.mark.parametrize("changes", [dict(), EXACT["mixtral"], EXACT["fine-grained, uneven, shared"]])
def test_upcycled_experts_and_routers_learn(changes):
    before = trained(**PLAIN)
    moe = MoEArgs(**dict(n_experts=4, aux_alpha=0.01) | changes)
    after = build(*upcycle(before.args, before.state_dict(), moe))
    assert_learns(after, [name for name, _ in after.named_parameters() if "feed_forward" in name])
    w2_EFD = after.layers[0].feed_forward.experts.w2
    assert not torch.equal(w2_EFD[0], w2_EFD[1])  # equal experts see different tokens, and part


def test_a_shared_expert_that_is_the_dense_feed_forward_gives_the_same_bits():
    before = llama4()
    args, state = upcycle(before.args, before.state_dict(), MoEArgs(n_experts=4, interleave=2, dense_layers=(3,)))
    after = build(args, state)
    assert [spec.ffn for spec in after.specs] == ["dense", "moe", "dense", "dense"]
    assert torch.equal(logits(before), logits(after))
    assert args.moe_width() == before.args.ffn_width()


@pytest.mark.parametrize("arch", DENSE)
def test_upcycling_keeps_the_function_of_other_families(arch):
    before = trained(**ARCHS[arch])
    moe = MoEArgs(n_experts=4, top_k=2, score="softmax", apply="output", renorm=True, shared=False)
    assert_same_function(before, build(*upcycle(before.args, before.state_dict(), moe)))


def test_routers_follow_the_seed_and_nothing_else_does():
    before = trained(**PLAIN)
    a, b, c = (upcycle(before.args, before.state_dict(), MoEArgs(n_experts=4), seed=s)[1] for s in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert {name for name in a if not torch.equal(a[name], c[name])} == {
        f"layers.{i}.feed_forward.router.weight" for i in range(4)
    }


@pytest.mark.parametrize(("changes", "key"), REFUSED.values(), ids=REFUSED)
def test_upcycling_refuses_what_would_not_keep_the_function(changes, key):
    before = trained(**PLAIN)
    with pytest.raises(UserError, match=key):
        upcycle(before.args, before.state_dict(), MoEArgs(**dict(n_experts=4) | changes))


@pytest.mark.parametrize(
    ("arch", "key"), [(dict(act="gelu"), "act=gelu"), (dict(gated=False), "gated"), (dict(ffn_bias=True), "ffn_bias")]
)
def test_upcycling_refuses_feed_forwards_that_no_expert_can_be(arch, key):
    before = trained(**PLAIN | arch)
    with pytest.raises(UserError, match=f"model.{key}"):
        upcycle(before.args, before.state_dict(), MoEArgs(n_experts=4))


def test_upcycling_refuses_a_mixture_and_a_pattern_that_stays_dense():
    mixture = trained(**ARCHS["mixture"])
    with pytest.raises(UserError, match="model.moe is given"):
        upcycle(mixture.args, mixture.state_dict(), MoEArgs(n_experts=4))
    dense = trained(**PLAIN)
    with pytest.raises(UserError, match="interleave=5 .* none of the 4 layers"):
        upcycle(dense.args, dense.state_dict(), MoEArgs(n_experts=4, interleave=5))


@pytest.mark.parametrize("where", ["spread", "end"])
@pytest.mark.parametrize("arch", ARCHS)
def test_more_layers_give_the_same_bits_and_learn(arch, where):
    before = trained(**ARCHS[arch])
    args, state = deepen(before.args, before.state_dict(), 6, where)
    after = build(args, state)
    assert torch.equal(logits(before), logits(after))
    periods_of_two = arch in ("gemma 2", "mixture")
    new = ("layers.4.", "layers.5.") if where == "end" or periods_of_two else ("layers.2.", "layers.5.")
    names = [name for name, _ in after.named_parameters() if name.startswith(new)]
    assert_learns(after, names)


def test_spread_layers_are_copies_that_stand_between_the_old_ones():
    before = trained(**PLAIN)
    _, state = deepen(before.args, before.state_dict(), 6)
    old = before.state_dict()
    for new, source in enumerate([0, 1, 1, 2, 3, 3]):
        assert torch.equal(state[f"layers.{new}.attention.wq.weight"], old[f"layers.{source}.attention.wq.weight"])
    silent = [i for i in range(6) if not state[f"layers.{i}.attention.wo.weight"].any()]
    assert silent == [2, 5]


def test_layers_of_llama_4_keep_their_kinds():
    """Chunks, NoPE, temperature, MoE every second layer, one exception: whole periods of four layers keep all that."""
    before = llama4(n_layers=8, moe=MOE | dict(interleave=2, dense_layers=[5]))
    args, state = deepen(before.args, before.state_dict(), 16)
    after = build(args, state)
    assert torch.equal(logits(before), logits(after))
    assert [spec.ffn for spec in after.specs] == ["dense", "moe"] * 4 + ["dense", "dense"] + ["dense", "moe"] * 3
    assert [spec.attention.rope for spec in after.specs] == [True, True, True, False] * 4
    assert args.moe is not None and args.moe.dense_layers == (9,)


def test_layers_in_between_that_would_change_old_ones_are_refused():
    before = llama4()
    with pytest.raises(UserError, match="n_layers=6: .* after 4, .* use 8 or 12, or where=end"):
        deepen(before.args, before.state_dict(), 6)
    after = build(*deepen(before.args, before.state_dict(), 6, "end"))
    assert torch.equal(logits(before), logits(after))
    with pytest.raises(UserError, match="n_layers=4 must be above"):
        deepen(before.args, before.state_dict(), 4)
    with pytest.raises(UserError, match="where=middle"):
        deepen(before.args, before.state_dict(), 8, "middle")


@pytest.mark.parametrize(("where", "expected"), [("spread", (0.3, 0.3, -0.2, -0.2)), ("end", (0.3, -0.2, -0.2, -0.2))])
def test_new_routed_layers_have_the_thresholds_of_those_they_are_copies_of(where, expected):
    routed = PLAIN | dict(layer_pattern=["ssm", "routed"], ssm={"head_width": 16})
    before = trained(**routed, route={"thresholds": [0.3, -0.2], "max_rate": 1.0})
    args, state = deepen(before.args, before.state_dict(), 8, where)
    assert args.route is not None and args.route.thresholds == expected
    assert torch.equal(logits(before), logits(build(args, state)))


def test_a_layer_of_a_new_kind_is_drawn():
    before = llama4(n_layers=3)
    after = build(*deepen(before.args, before.state_dict(), 4, "end", seed=8))
    assert torch.equal(logits(before), logits(after))
    drawn = LLM(after.args, seed=8).layers[3].attention.wq.weight
    assert torch.equal(after.layers[3].attention.wq.weight, drawn)


@pytest.mark.parametrize("rows", ["mean", "initial"])
@pytest.mark.parametrize("arch", ["llama", "gemma 2"])
def test_a_larger_vocabulary_keeps_the_logits_of_old_tokens(arch, rows):
    before = trained(**ARCHS[arch])
    after = build(*enlarge_vocabulary(before.args, before.state_dict(), VOCAB + 31, rows))
    with torch.no_grad():
        hidden = [model(tokens(3, 21), return_hidden=True).hidden for model in (before, after)]
    assert torch.equal(*hidden)
    heads = [model.output or model.tok_embeddings for model in (before, after)]
    assert torch.equal(heads[0].weight, heads[1].weight[:VOCAB])
    expected, found = logits(before), logits(after)
    assert found.shape[-1] == VOCAB + 31
    # the products are the same; a BLAS may add them up in another order in a matrix of another size
    assert (found[..., :VOCAB] - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert_learns(after, ["tok_embeddings.weight"])


def test_new_tokens_at_the_mean_cost_old_ones_little():
    """At most ln(1 + n / V): Jensen's inequality; 1e-5 is for rounding."""
    before = trained(**PLAIN)
    after = build(*enlarge_vocabulary(before.args, before.state_dict(), VOCAB + 31))
    rows = tokens(3, 22)
    with torch.no_grad():
        old, new = (m(rows[:, :-1], labels=rows[:, 1:].contiguous()).loss_sum / 63 for m in (before, after))
    assert 0 < new - old <= math.log(1 + 31 / VOCAB) + 1e-5
    mean = before.output.weight.mean(0)
    assert torch.allclose(after.output.weight[VOCAB:], mean.expand(31, -1), rtol=1e-6, atol=1e-7)


def test_a_vocabulary_only_grows():
    before = trained(**PLAIN)
    with pytest.raises(UserError, match=f"vocab_size={VOCAB} must be above"):
        enlarge_vocabulary(before.args, before.state_dict(), VOCAB)
    with pytest.raises(UserError, match="rows=zero"):
        enlarge_vocabulary(before.args, before.state_dict(), VOCAB + 1, "zero")


def test_nope_layers_change_the_function_and_can_be_trained():
    before = llama4(nope_layer_interval=None)
    after = build(*to_nope(before.args, before.state_dict(), 2))
    assert [(s.attention.rope, s.attention.mask) for s in after.specs] == [(True, "chunk"), (False, "full")] * 2
    expected, found = logits(before), logits(after)
    assert (found - expected).abs().max() > 1e-2 * expected.abs().max()
    assert_learns(after, [name for name, _ in after.named_parameters()])


def test_nope_intervals_that_do_nothing_are_refused():
    before = trained(**PLAIN)
    for args, interval in ((before.args, 5), (before.args.model_copy(update={"layer_pattern": ["attn:rope"]}), 2)):
        with pytest.raises(UserError, match=f"interval={interval} makes none"):
            to_nope(args, before.state_dict(), interval)
    with pytest.raises(UserError, match="nope_layer_interval=4"):
        to_nope(llama4().args, llama4().state_dict(), 2)


def test_surgery_leaves_what_it_is_given_keeps_its_dtype_and_copies_copies():
    before = trained(**PLAIN).bfloat16()
    state = before.state_dict()
    kept = {name: tensor.clone() for name, tensor in state.items()}
    made = [
        upcycle(before.args, state, MoEArgs(n_experts=4, hidden=80)),
        deepen(before.args, state, 5),
        enlarge_vocabulary(before.args, state, VOCAB + 3),
    ]
    assert all({tensor.dtype for tensor in new.values()} == {torch.bfloat16} for _, new in made)
    assert all(torch.equal(kept[name], state[name]) for name in kept)
    for _, new in made:  # no two parameters are the same memory, which would train as one
        assert len({tensor.untyped_storage().data_ptr() for tensor in new.values()}) == len(new)
    assert all(not new.keys() - dict(build(args, new).named_parameters()).keys() for args, new in made)


def test_weights_of_another_model_are_named():
    before = trained(**PLAIN)
    state = before.state_dict()
    with pytest.raises(UserError, match=r"weights: layers\.4\.attention_norm\.weight has shape None, expected \(48,\)"):
        deepen(before.args.model_copy(update={"n_layers": 5}), state, 6)
    with pytest.raises(UserError, match=r"weights: output\.weight has shape \(97, 48\), expected None"):
        enlarge_vocabulary(before.args.model_copy(update={"tie_embeddings": True}), state, 100)
