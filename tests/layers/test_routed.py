"""Routed layers: which tokens attend, what they say, and how thresholds follow scores."""

import math

import pytest
import torch
from torch import Tensor

from llm import LLM, ModelArgs
from llm.args import RouteArgs
from llm.cache import Cache
from llm.datatypes import BINS, ROUTE_NUMBERS, RouteCounts, TransformerInput
from llm.kernels.budget import passed
from llm.layers.routed import REACH, Routed, moved
from llm.parameters import ParameterTable
from tests.layers.test_hybrids import LENGTH, apart, hidden, tokens


def routed(combine: str = "add", pattern: str = "ssm,routed", threshold: float = 0.0, **route: object) -> LLM:
    """A float64 model in which the budgets of some documents are spent."""
    group = {"rate": 0.4, "max_rate": 0.5, "burst": 2, "combine": combine, **route}
    args = ModelArgs(
        dim=32, n_layers=4, n_heads=4, n_kv_heads=2, vocab_size=50, layer_pattern=pattern, ffn_hidden=48,
        ssm={"d_state": 8, "head_width": 8, "chunk": 8}, route=group,
    )  # fmt: skip
    model, generator = LLM(args).double(), torch.Generator().manual_seed(0)
    model.thresholds = {spec.index: threshold for spec in model.specs if spec.mixer.name == "routed"}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def token_by_token(
    want: Tensor, rate: float, burst: int, documents: Tensor | None, first: list[tuple[int, int]]
) -> Tensor:
    """first: of each row, position of its first token, and how many passed before it."""
    found = torch.zeros_like(want)
    for row, (position, count) in enumerate(first):
        for t in range(want.shape[1]):
            if documents is not None and t and documents[row, t] != documents[row, t - 1]:
                position, count = 0, 0
            if want[row, t] and count < math.floor(rate * (position + 1) + burst):
                found[row, t] = True
                count += 1
            position += 1
    return found


def test_a_budget_is_kept_as_if_tokens_came_one_by_one_and_begins_anew_with_each_document():
    generator = torch.Generator().manual_seed(0)
    for trial in range(60):
        rate, burst = torch.rand((), generator=generator).item(), trial % 4
        want = torch.rand(3, 40, generator=generator) < torch.rand((), generator=generator)
        documents = (torch.rand(3, 40, generator=generator) < 0.1).long().cumsum(1) if trial % 2 else None
        first = [(0, 0)] * 3
        if not trial % 2:
            first = [(p, min(n, math.floor(rate * p + burst))) for p, n in ((0, 0), (7, 3), (19, 9))]
        positions = torch.arange(40) + torch.tensor(first)[:, :1]
        if documents is not None:
            begins = torch.cat([torch.ones(3, 1, dtype=torch.bool), documents.diff(dim=1) > 0], 1)
            positions = torch.arange(40) - (begins * torch.arange(40)).cummax(1).values
        bounds = (rate * (positions.double() + 1) + burst).floor().long()
        found = passed(want, bounds, documents, torch.tensor([n for _, n in first]))
        assert torch.equal(found, token_by_token(want, rate, burst, documents, first))


@pytest.mark.parametrize("combine", ["add", "select"])
@pytest.mark.parametrize("splits", [[1] * LENGTH, [5, 1, 1, 12, 18]])
def test_tokens_that_come_in_parts_are_tokens_that_come_at_once(splits, combine):
    model = routed(combine)
    cache = Cache(model.args)
    parts = [hidden(model, part, cache) for part in tokens().split(splits, dim=1)]
    assert apart(torch.cat(parts, 1), hidden(model, tokens())) < 1e-12


def test_packed_documents_are_separate_documents_and_padding_is_none():
    model, flat, bounds = routed(), tokens().flatten(), [0, 5, 6, 20, 37, 74, 77, 111]
    found = hidden(model, TransformerInput(tokens(), cu_seqlens=torch.tensor(bounds))).flatten(0, 1)
    for first, end in zip(bounds, bounds[1:], strict=False):
        assert apart(found[first:end], hidden(model, flat[None, first:end])[0]) < 1e-12
    positions, padded = torch.full((3, 45), -1), torch.zeros(3, 45, dtype=torch.int64)
    positions[:, 8:], padded[:, 8:] = torch.arange(LENGTH), tokens()
    inputs = TransformerInput(padded, tokens_position=positions)
    assert apart(hidden(model, inputs)[:, 8:], hidden(model, tokens())) < 1e-12


def test_no_token_sees_one_behind_it_nor_do_those_behind_it_decide_whether_it_attends():
    model, other = routed(), tokens()
    other[:, 20] = (other[:, 20] + 1) % 50
    before, after = hidden(model, tokens()), hidden(model, other)
    assert apart(before[:, :20], after[:, :20]) < 1e-14
    assert (before[:, 20:] != after[:, 20:]).any(-1).all()


def layer_of(model: LLM) -> Routed:
    layer = model.layers[0].attention
    assert isinstance(layer, Routed)
    return layer


def of_layer(model: LLM, x: Tensor) -> Tensor:
    """What the first layer's mixer makes of x (1, T, D)."""
    ctx = model.context(TransformerInput(torch.zeros(1, x.shape[1], dtype=torch.int64)))
    return layer_of(model)(x, ctx).detach()


def test_a_token_attends_to_those_before_it_that_do_and_counts_by_its_gate():
    torch.manual_seed(0)
    for combine in ("add", "select"):
        model = routed(combine, "routed:nope", threshold=-0.5)
        layer, x = layer_of(model), torch.randn(1, 30, 32, dtype=torch.float64)
        attn = layer.attn
        scores = x[0] @ layer.route.weight / layer.route.weight.norm()
        attends = token_by_token((scores > -0.5)[None], 0.5, 2, None, [(0, 0)])[0]
        assert 0 < attends.sum() < (scores > -0.5).sum(), "no budget is spent"
        expected = layer.ssm(x, model.context(TransformerInput(torch.zeros(1, 30, dtype=torch.int64))))[0].clone()
        q, k, v = (w(x[0]).unflatten(-1, (-1, 8)) for w in (attn.wq, attn.wk, attn.wv))
        k, v = (y.repeat_interleave(2, dim=1) for y in (k, v))
        for t in attends.nonzero().flatten().tolist():
            seen = attends[: t + 1].nonzero().flatten()
            weights = (torch.einsum("hd,shd->hs", q[t], k[seen]) / 8**0.5).softmax(-1)
            said = attn.wo(torch.einsum("hs,shd->hd", weights, v[seen]).flatten()) * (scores[t] + 0.5).sigmoid()
            expected[t] = said + (expected[t] if combine == "add" else 0)
        torch.testing.assert_close(of_layer(model, x)[0], expected)


def test_above_all_scores_a_threshold_leaves_the_state_space_mixer_alone():
    torch.manual_seed(0)
    model, x = routed(pattern="routed", threshold=math.inf), torch.randn(1, 30, 32, dtype=torch.float64)
    ctx = model.context(TransformerInput(torch.zeros(1, 30, dtype=torch.int64)))
    assert torch.equal(of_layer(model, x), layer_of(model).ssm(x, ctx))


def test_the_budget_bounds_the_rate_whatever_the_scores():
    model = routed(threshold=-math.inf, max_rate=0.4, burst=3).train()
    reports = model(tokens()).routes
    for counts in reports.values():
        assert counts.numbers[BINS] == counts.scores.sum() == 3 * LENGTH
        assert counts.numbers[BINS + 1] == 3 * math.floor(0.4 * LENGTH + 3)


def test_the_scoring_vector_learns_through_the_gates_of_the_tokens_that_attend():
    model = routed().train()
    model(tokens(), labels=tokens()).loss_sum.backward()
    assert all(model.layers[i].attention.route.weight.grad.abs().max() > 0 for i in (1, 3))


def counts_of(scores: Tensor) -> RouteCounts:
    numbers = torch.zeros(ROUTE_NUMBERS, dtype=torch.float64)
    numbers[:BINS] = torch.histc(scores, BINS, -REACH, REACH)
    return RouteCounts(numbers)


def test_a_threshold_goes_to_the_quantile_of_a_step_s_scores_at_once_and_then_by_and_by():
    scores, route = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).double(), RouteArgs(rate=0.15)
    quantile = scores.quantile(0.85).item()
    width = 2 * REACH / BINS
    first = moved(None, counts_of(scores), route)
    assert first is not None and abs(first - quantile) < width
    second = moved(first, counts_of(scores + 1), route)
    assert second is not None and abs(second - (first + 0.1)) < width
    assert moved(first, counts_of(scores[:0]), route) == first


@pytest.mark.parametrize(
    ("pattern", "state", "expected"),
    [("ssm,routed", 16, 152_496_864), ("ssm,routed", 128, 154_574_688), ("routed", 16, 166_657_248)],
)
def test_the_routed_models_of_768_by_12_have_so_many_parameters(pattern, state, expected):
    args = ModelArgs(
        dim=768, n_layers=12, n_heads=12, vocab_size=50257, layer_pattern=pattern, tie_embeddings=True,
        ssm={"d_state": state}, route={},
    )  # fmt: skip
    assert sum(row.numel for row in ParameterTable.of(args).values()) == expected


def test_thresholds_of_a_model_are_kept_with_its_args():
    args = routed().args
    kept = args.model_copy(update={"route": args.route.model_copy(update={"thresholds": (0.25, -0.5)})})
    assert LLM(kept).thresholds == {1: 0.25, 3: -0.5}
    with pytest.raises(ValueError, match="there are 2 routed layers, not 1"):
        ModelArgs.model_validate(kept.model_dump() | {"route": kept.route.model_dump() | {"thresholds": (0.25,)}})
