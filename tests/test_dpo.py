"""Preferences: TRL's sigmoid loss, its gradient, what it says besides, and what it counts."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm import LLM, ModelArgs
from llm.batch import IGNORE, Batch, Targets
from llm.datatypes import TransformerInput
from llm.errors import UserError
from llm.objectives import Objectives
from llm.tasks import REFERENCE, task_named
from llm.tasks.dpo import Preference
from llm.train.config import validate
from tests.distributed.harness import tiny_config

ARGS = ModelArgs(dim=16, n_layers=2, n_heads=2, ffn_hidden=24, vocab_size=50, max_seq_len=40)
ANSWERS = [[(9, 4), (7, 3)], [(5, 1), (11, 6), (4, 2), (8, 5)]]
"""Tokens of each answer with its prompt, and how many of them are targets: chosen and rejected in turn, row by row."""


def batch_of(references: bool = True) -> Batch:
    """One row with one pair and one with two, both filled up."""
    draw = torch.Generator().manual_seed(3)
    length = 30
    tokens = torch.randint(0, 50, (2, length), generator=draw)
    labels = torch.full((2, length), IGNORE)
    pair, reference = torch.zeros(2, length), torch.zeros(2, length)
    bounds = {0, length, 2 * length}
    for row, answers in enumerate(ANSWERS):
        at = 0
        for i, (n, targets) in enumerate(answers):
            end = at + n
            labels[row, end - targets : end] = torch.randint(0, 50, (targets,), generator=draw)
            pair[row, at:end] = (i // 2 + 1) * (-1 if i % 2 else 1)
            reference[row, end - targets] = -float(torch.rand((), generator=draw)) * 4 * targets
            bounds |= {row * length + at, row * length + end}
            at = end
    inputs = TransformerInput(tokens, cu_seqlens=torch.tensor(sorted(bounds), dtype=torch.int32))
    values = {"pair": pair} | ({REFERENCE: reference} if references else {})
    return Batch(inputs, {"dpo": Targets(labels)}, values=values)


def of_answers(x_BT: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Sums over the chosen and over the rejected answers, (pairs,) each, in order."""
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for x_T, pair_T in zip(x_BT, batch.values["pair"], strict=True):
        for p in range(1, int(pair_T.max()) + 1):
            for sums, sign in zip(found, (1, -1), strict=True):
                sums.append(x_T[pair_T == sign * p].sum())
    return torch.stack(found[0]), torch.stack(found[1])


def as_trl_does(model: LLM, batch: Batch, beta: float, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """Losses and margins of rewards of the pairs, by logits of the whole batch (DPOTrainer, loss_type sigmoid)."""
    labels = batch.targets["dpo"].labels
    logp_BTV = model(batch.inputs).logits.log_softmax(-1)
    logp_BT = logp_BTV.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels >= 0)
    chosen, rejected = of_answers(logp_BT, batch)
    ref_chosen, ref_rejected = of_answers(batch.values[REFERENCE], batch)
    logits = (chosen - rejected) - (ref_chosen - ref_rejected)
    losses = -F.logsigmoid(beta * logits) * (1 - label_smoothing) - F.logsigmoid(-beta * logits) * label_smoothing
    margins = beta * (chosen - ref_chosen) - beta * (rejected - ref_rejected)
    return losses, margins.detach()


@pytest.mark.parametrize(("beta", "label_smoothing"), [(0.1, 0.0), (0.5, 0.2)])
def test_loss_gradient_and_measures_are_those_of_trls_formula(beta: float, label_smoothing: float) -> None:
    """float32 sums in another order."""
    model, batch = LLM(ARGS), batch_of()
    objectives = Objectives([Preference(beta, label_smoothing)])
    losses, margins = as_trl_does(model, batch, beta, label_smoothing)
    found = model(batch.inputs, losses=objectives.losses_of(model, batch)).losses["dpo"]
    assert float(found.total.detach()) == pytest.approx(float(losses.detach().sum()), rel=1e-5)
    assert float(found.measures["margin"]) == pytest.approx(float(margins.sum()), rel=1e-5)
    assert float(found.measures["accuracy"]) == int((margins > 0).sum())
    parameters = list(model.parameters())
    for mine, right in zip(
        torch.autograd.grad(found.total, parameters), torch.autograd.grad(losses.sum(), parameters), strict=True
    ):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-6)


def test_without_gradients_the_loss_is_the_same() -> None:
    model, batch = LLM(ARGS), batch_of()
    losses = Objectives([Preference()]).losses_of(model, batch)
    with torch.no_grad():
        alone = model(batch.inputs, losses=losses).losses["dpo"].total
    assert torch.equal(alone, model(batch.inputs, losses=losses).losses["dpo"].total.detach())


def test_against_itself_a_model_has_the_loss_log_2_for_every_pair() -> None:
    model, batch = LLM(ARGS), batch_of(references=False)
    hidden = model(batch.inputs, return_hidden=True).hidden
    labels = batch.targets["dpo"].labels
    first = torch.zeros_like(labels, dtype=torch.bool)
    logp = -model.token_nll(hidden, labels)
    reference = torch.zeros_like(logp)
    for row, pair_T in enumerate(batch.values["pair"]):
        for slot in pair_T.unique().tolist():
            if slot:
                here = (pair_T == slot) & (labels[row] >= 0)
                first[row, int(here.nonzero()[0])] = True
                reference[row, int(here.nonzero()[0])] = logp[row, here].sum()
    batch = replace(batch, values={**batch.values, REFERENCE: reference})
    found = model(batch.inputs, losses=Objectives([Preference()]).losses_of(model, batch)).losses["dpo"]
    assert int(first.sum()) == 6
    assert float(found.total.detach()) == pytest.approx(3 * 0.6931472, rel=1e-6)
    assert float(found.measures["margin"]) == pytest.approx(0, abs=1e-5)


def test_pairs_are_counted_and_targets_as_tokens() -> None:
    counts = Objectives([Preference()]).count([batch_of(), batch_of()])
    assert (counts.main, counts.targets) == (6, 2 * sum(n for row in ANSWERS for _, n in row))


def test_a_batch_without_a_pair_has_the_loss_0_and_no_gradient() -> None:
    model, batch = LLM(ARGS), batch_of()
    nothing = torch.zeros_like(batch.values["pair"])
    labels = torch.full_like(batch.targets["dpo"].labels, IGNORE)
    batch = replace(batch, targets={"dpo": Targets(labels)}, values={"pair": nothing, REFERENCE: nothing})
    objectives = Objectives([Preference()])
    found = model(batch.inputs, losses=objectives.losses_of(model, batch)).losses["dpo"]
    found.total.backward()
    assert objectives.count([batch]).main == 0 and float(found.total.detach()) == 0
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("task", "kind", "said"), [("lm", "preference", "set task=dpo"), ("dpo", "chat", "trains on kind preference")]
)
def test_preferences_go_with_their_task_alone(task: str, kind: str, said: str, tmp_path: Path) -> None:
    source = {"path": str(tmp_path / "rows.jsonl"), "kind": kind}
    raw = {**tiny_config(tmp_path, data={"train": [source], "valid": None}), "task": task}
    with pytest.raises(UserError, match=f"data.train.0.kind={kind}: .*{said}"):
        validate(raw, "config")


def test_options_of_preferences_are_refused_where_another_task_is_trained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dpo.beta=0.3: is for task=dpo"):
        validate({**tiny_config(tmp_path), "dpo": {"beta": 0.3}}, "config")


def test_the_task_takes_its_options_and_its_validation_is_a_mean_over_pairs() -> None:
    task = task_named("dpo")
    (objective,) = task.objectives({"beta": 0.3, "label_smoothing": 0.1})
    assert isinstance(objective, Preference) and (objective.beta, objective.label_smoothing) == (0.3, 0.1)
    assert task.metrics(6.0, [4]) == {"valid_loss": 1.5}
