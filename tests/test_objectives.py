"""Objectives: each a sum over its own targets, divided by its own count, whatever the cut of a batch."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm import LLM, ModelArgs
from llm.args import MoEArgs
from llm.batch import IGNORE, Batch, Counts, Rows, Targets
from llm.datatypes import LossSum, TransformerInput
from llm.objectives import NextToken, Objective, Objectives, make_objective, objectives_of, register
from llm.parallel.engine.step import Tally
from llm.parallel.launch.world import World
from llm.tasks import task_named
from tests.data.helpers import LM

ALONE = World(0, 1, 0, torch.device("cpu"))
ARGS = ModelArgs(
    dim=16, n_layers=2, n_heads=2, ffn_hidden=24, vocab_size=50, max_seq_len=16,
    moe=MoEArgs(n_experts=4, top_k=2, hidden=8, interleave=2, aux_alpha=0.01, z_alpha=0.001),
)  # fmt: skip


class FirstTokens(Objective):
    """Of a test: sequences have one target each."""

    name = "first_tokens"

    def __init__(self, weight: float = 0.5) -> None:
        self.weight = weight

    def count(self, batch: Batch) -> int:
        return len(batch.inputs.tokens)

    def loss_sum(self, model: LLM, hidden_BTD: Tensor, batch: Batch) -> LossSum:
        return LossSum(hidden_BTD[:, 0].float().square().sum())


def batch_of(n_rows: int, seed: int = 0, weights: bool = False) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 50, (n_rows, 9), generator=draw)
    labels = tokens[:, 1:].clone()
    labels[torch.rand(labels.shape, generator=draw) < 0.3] = IGNORE
    factors = torch.randint(1, 2049, labels.shape, generator=draw) / 1024 if weights else None
    return Batch(TransformerInput(tokens[:, :-1].contiguous()), {"lm": Targets(labels, factors)})


def rows_of(source: list[int]) -> Rows:
    number = np.array(source)
    return Rows(number, np.arange(len(source)), np.arange(len(source)), np.zeros_like(number))


def test_each_objective_has_a_count_of_its_own() -> None:
    objectives = Objectives([*LM.final, FirstTokens()], LM.layers)
    batches = [batch_of(3), batch_of(5, seed=1)]
    counts = objectives.count(batches)
    n_targets = sum(int((batch.targets["lm"].labels >= 0).sum()) for batch in batches)
    assert counts.objectives == {"lm": n_targets, "first_tokens": 8, "moe_balance": 64, "moe_z": 64}
    assert (counts.targets, counts.tokens, counts.sources) == (n_targets, 64, {})
    assert counts.with_values(counts.values()) == counts


def test_targets_are_counted_by_source_where_there_are_several_and_absent_rows_by_none() -> None:
    batch = replace(batch_of(4), rows=rows_of([1, 0, -1, 1]))
    per_row = (batch.targets["lm"].labels >= 0).sum(1).tolist()
    assert LM.count([batch], ["a"]).sources == {}
    found = LM.count([batch, batch], ["a", "b", "c"]).sources
    assert found == {"a": 2 * per_row[1], "b": 2 * (per_row[0] + per_row[3]), "c": 0}


def test_a_row_that_is_cut_into_sequences_is_of_one_source() -> None:
    whole = batch_of(4)
    labels = whole.targets["lm"].labels
    cut = Batch(TransformerInput(whole.inputs.tokens.view(8, 4)), {"lm": Targets(labels.view(8, 4))})
    by_source = [LM.count([replace(batch, rows=rows_of([0, 1, 1, 0]))], ["a", "b"]).sources for batch in (whole, cut)]
    assert by_source[0] == by_source[1]


def test_the_mean_of_a_source_is_that_of_its_targets_and_unknown_without_any() -> None:
    model, batch = LLM(ARGS), replace(batch_of(4), rows=rows_of([1, 0, 1, 0]))
    out = model(batch.inputs, losses=LM.losses_of(model, batch))
    tally = Tally(ARGS, LM, LM.count([batch], ["a", "b", "c"]), ALONE)
    per_token = out.losses["lm"].per_token
    tally.add_loss("lm", out.losses["lm"].total)
    tally.add_by_source(per_token, batch.rows)
    result = tally.result(1.0, 1)
    labels = batch.targets["lm"].labels
    for source, rows in (("a", [1, 3]), ("b", [0, 2])):
        expected = float(per_token[rows].sum()) / int((labels[rows] >= 0).sum())
        assert result.source_losses[source] == pytest.approx(expected, rel=1e-6)  # float32 sums in another order
    assert math.isnan(result.source_losses["c"])
    n = LM.count([batch]).targets
    together = sum(result.source_losses[source] * tally.step_counts.sources[source] for source in "ab") / n
    assert together == pytest.approx(result.losses["lm"], rel=1e-6)


def test_a_steps_loss_is_the_sum_of_weight_times_sum_over_count() -> None:
    counts = Counts(100, 40, {"lm": 40, "other": 0, "third": 8}, {})
    objectives = Objectives([NextToken("lm"), NextToken("other", 2.0), NextToken("third", 0.5)])
    tally = Tally(ARGS.model_copy(update={"moe": None}), objectives, counts, ALONE)
    for value in (20.0, 60.0):
        tally.add_loss("lm", torch.tensor(value))
    tally.add_loss("third", torch.tensor(4.0))
    result = tally.result(1.0, 1)
    assert result.losses == {"lm": 2.0, "other": 0.0, "third": 0.25} and result.loss == 2.25
    assert float(tally.one_or_nan(2.25)) == 1.0 and math.isnan(float(tally.one_or_nan(2.2)))
    assert float(tally.weighted("third", torch.tensor(4.0), ranks=3)) == 0.75


def test_weights_of_targets_are_what_the_mean_divides_by_and_targets_are_counted_as_tokens() -> None:
    """Multiples of 1/1024 add up exactly, however a batch is cut: the whole is its rows, in any order."""
    batch = replace(batch_of(4, weights=True), rows=rows_of([1, 0, 1, 1]))
    targets = batch.targets["lm"]
    assert targets.weights is not None
    counted = targets.labels >= 0
    counts = LM.count([batch], ["a", "b"])
    assert counts.targets == int(counted.sum()) and counts.main == sum(targets.weights[counted].tolist())
    per_row = [sum(w[c].tolist()) for w, c in zip(targets.weights, counted, strict=True)]
    assert counts.sources == {"a": per_row[1], "b": per_row[3] + per_row[0] + per_row[2]}
    assert counts.with_values(counts.values()) == counts


def test_the_means_of_weighted_targets_are_weighted_by_step_and_by_source() -> None:
    model, batch = LLM(ARGS), replace(batch_of(4, weights=True), rows=rows_of([1, 0, 1, 0]))
    targets = batch.targets["lm"]
    assert targets.weights is not None
    logits = model(batch.inputs).logits
    nll = F.cross_entropy(logits.flatten(0, 1), targets.labels.flatten(), ignore_index=IGNORE, reduction="none")
    weighted = (nll.view_as(targets.weights) * targets.weights).detach()
    weight = targets.weights * (targets.labels >= 0)
    found = model(batch.inputs, losses=LM.losses_of(model, batch)).losses["lm"]
    tally = Tally(ARGS, LM, LM.count([batch], ["a", "b"]), ALONE)
    tally.add_loss("lm", found.total)
    tally.add_by_source(found.per_token, batch.rows)
    result = tally.result(1.0, 1)
    assert result.losses["lm"] == pytest.approx(float(weighted.sum() / weight.sum()), rel=1e-5)  # float32 sums
    for source, rows in (("a", [1, 3]), ("b", [0, 2])):
        mean = float(weighted[rows].sum() / weight[rows].sum())
        assert result.source_losses[source] == pytest.approx(mean, rel=1e-5)


def test_a_batch_without_a_target_has_the_loss_0_and_no_gradient() -> None:
    model, batch = LLM(ARGS.model_copy(update={"moe": None})), batch_of(2)
    nothing = Targets(torch.full_like(batch.targets["lm"].labels, IGNORE), torch.ones(2, 8))
    batch = replace(batch, targets={"lm": nothing}, rows=rows_of([0, 0]))
    tally = Tally(model.args, LM, LM.count([batch], ["a", "b"]), ALONE)
    out = model(batch.inputs, losses=LM.losses_of(model, batch))
    tally.add_loss("lm", out.losses["lm"].total)
    tally.weighted("lm", out.losses["lm"].total, ranks=2).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and not any(gradient.any() for gradient in gradients)
    result = tally.result(0.0, 1)
    assert (result.loss, result.counts.targets) == (0.0, 0) and math.isnan(result.source_losses["a"])
    assert float(tally.one_or_nan(None)) == 1.0


class Measured(FirstTokens):
    """Of a test: says the largest and the smallest besides."""

    name = "measured"
    measures = ("largest", "smallest")

    def loss_sum(self, model: LLM, hidden_BTD: Tensor, batch: Batch) -> LossSum:
        first_B = hidden_BTD[:, 0, 0].detach().float()
        said = {"largest": first_B.max(), "smallest": first_B.min()}
        return super().loss_sum(model, hidden_BTD, batch)._replace(measures=said)


def test_what_an_objective_says_besides_is_a_mean_over_its_own_count() -> None:
    objectives = Objectives([*LM.final, Measured()])
    counts = Counts(16, 16, {"lm": 16, "measured": 4}, {})
    tally = Tally(ARGS, objectives, counts, ALONE)
    for value in (3.0, 5.0):
        tally.add_measures("measured", {"largest": torch.tensor(value), "smallest": torch.tensor(-value)})
    assert tally.result(1.0, 1).measures == {"measured_largest": 2.0, "measured_smallest": -2.0}
    none = replace(counts, objectives={**counts.objectives, "measured": 0})
    assert all(math.isnan(value) for value in Tally(ARGS, objectives, none, ALONE).result(1.0, 1).measures.values())


@pytest.mark.parametrize("weights", [False, True])
def test_the_next_tokens_loss_is_the_cross_entropy_of_the_logits(weights: bool) -> None:
    """In the sum, in each token's part, and in the gradient, which weights scale. float32 sums in another order."""
    model, batch = LLM(ARGS), batch_of(4, weights=weights)
    targets = batch.targets["lm"]
    factors = torch.ones(targets.labels.shape) if targets.weights is None else targets.weights
    logits = model(batch.inputs).logits
    nll = F.cross_entropy(logits.flatten(0, 1), targets.labels.flatten(), ignore_index=IGNORE, reduction="none")
    expected = nll.view_as(factors)
    ours = model(batch.inputs, losses=LM.losses_of(model, batch)).losses["lm"]
    torch.testing.assert_close(ours.per_token, (expected * factors).detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.total, (expected * factors).sum(), rtol=1e-5, atol=0)
    parameters = list(model.parameters())
    gradients = (
        torch.autograd.grad(loss, parameters, allow_unused=True) for loss in (ours.total, (expected * factors).sum())
    )
    for mine, right in zip(*gradients, strict=True):
        if right is not None:
            torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-6)


def test_the_first_objective_is_what_a_validation_measures() -> None:
    found = objectives_of(task_named("lm").objectives(), {})
    assert found.main.name == "lm" and list(found.weights) == ["lm", "moe_balance", "moe_z"]


def test_names_are_given_once_and_something_is_trained_for() -> None:
    with pytest.raises(ValueError, match="two objectives are called lm"):
        Objectives([NextToken("lm"), NextToken("lm")])
    with pytest.raises(ValueError, match="no objective to train for"):
        Objectives([])


def test_a_registered_objective_is_made_with_the_options_of_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm.objectives.FACTORIES", {})
    register("first_tokens", FirstTokens)
    assert make_objective("first_tokens", {"weight": 0.25}).weight == 0.25
    with pytest.raises(ValueError, match="an objective is called first_tokens already"):
        register("first_tokens", FirstTokens)
    with pytest.raises(ValueError, match="train.objectives.first_token: no such objective; known are first_tokens"):
        make_objective("first_token", {})
    with pytest.raises(ValueError, match=r"train.objectives.first_tokens=.*wieght.*the options are weight: float"):
        make_objective("first_tokens", {"wieght": 1})
    register("other", FirstTokens)
    with pytest.raises(ValueError, match="calls itself first_tokens"):
        make_objective("other", {})


def test_an_unknown_task_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="task=ml: no such task; known are autoregressive, dpo, lm"):
        task_named("ml")
