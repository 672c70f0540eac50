"""Predictions of samples: losses and gradients against torch, counts, labels that are missing."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm import LLM, ModelArgs
from llm.args import LoraArgs
from llm.batch import IGNORE, Batch, Targets
from llm.datatypes import TransformerInput
from llm.errors import UserError
from llm.foreign.export import choose_family
from llm.layers.prediction import in_units_of_labels
from llm.parameters import ParameterTable
from llm.tasks import task_named
from llm.tasks.prediction import Prediction, labels_of

SHAPE: dict[str, Any] = {"dim": 16, "n_layers": 2, "n_heads": 2, "ffn_hidden": 24, "vocab_size": 50, "max_seq_len": 40}
KINDS: dict[str, dict[str, Any]] = {
    "classification": {"n_prediction": 4},
    "regression": {
        "n_prediction": 3, "prediction": "regression", "prediction_mean": (1.0, -2.0, 30.0),
        "prediction_std": (0.5, 2.0, 10.0),
    },
    "multilabel": {"n_prediction": 3, "prediction": "multilabel", "pool": "first"},
}  # fmt: skip
NAN = float("nan")
BOUNDS = [0, 4, 9, 12, 20, 24]
"""Of documents in rows of 12 tokens: three and two, of which the third and the last have no labels."""
LABELLED = [0, 1, 3]
LABELS = {
    "classification": [[3.0], [0.0], [NAN]],
    "regression": [[1.5, NAN, 20.0], [0.25, -4.0, NAN], [NAN, 1.0, 45.0]],
    "multilabel": [[1.0, 0.0, 1.0], [NAN, NAN, 0.0], [NAN, 1.0, 0.0]],
}
WEIGHTS = [0.5, 2.0, 1.25]


def args_of(kind: str, **changes: Any) -> ModelArgs:
    return ModelArgs(**SHAPE, **KINDS[kind], **changes)


def batch_of(kind: str, weights: bool = True) -> Batch:
    """Two rows of packed documents, of which some have labels, and some of these are missing."""
    tokens = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(2))
    labels, weight = torch.full((24,), IGNORE), torch.ones(24)
    values = torch.zeros(len(LABELS[kind][0]), 24)
    for document, of_sample, factor in zip(LABELLED, LABELS[kind], WEIGHTS, strict=True):
        at = BOUNDS[document]
        labels[at], weight[at], values[:, at] = 0, factor, torch.tensor(of_sample)
    inputs = TransformerInput(tokens, cu_seqlens=torch.tensor(BOUNDS, dtype=torch.int32))
    targets = Targets(labels.view(2, 12), weight.view(2, 12) if weights else None)
    return Batch(
        inputs, {"prediction": targets}, values={f"prediction.{k}": x.view(2, 12) for k, x in enumerate(values)}
    )


def as_torch_does(kind: str, predictions_Sn: Tensor, label_smoothing: float) -> Tensor:
    """Sample after sample, label after label."""
    total = torch.zeros(())
    for logits, labels, weight in zip(predictions_Sn, LABELS[kind], WEIGHTS, strict=True):
        for k, label in enumerate(labels):
            if label != label:
                continue
            target = torch.tensor(label)
            if kind == "classification":
                loss = F.cross_entropy(logits, target.long(), label_smoothing=label_smoothing)
            elif kind == "multilabel":
                loss = F.binary_cross_entropy_with_logits(logits[k], target)
            else:
                mean, std = (KINDS[kind][f"prediction_{x}"][k] for x in ("mean", "std"))
                loss = F.mse_loss(logits[k], (target - mean) / std)
            total = total + weight * loss
    return total


def loss_of(model: LLM, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
    objective = Prediction(label_smoothing)
    out = model(batch.inputs, losses=lambda hidden: {"prediction": objective.loss_sum(model, hidden, batch)})
    return out.losses["prediction"].total


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_torch_sample_by_sample(kind: str, label_smoothing: float) -> None:
    model, batch = LLM(args_of(kind), seed=1), batch_of(kind)
    hidden = model(batch.inputs, return_hidden=True).hidden
    expected = as_torch_does(kind, model.predictions(hidden, batch.inputs)[LABELLED], label_smoothing)
    found = loss_of(model, batch, label_smoothing)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)  # float32 sums in another order
    trained = {name: p for name, p in model.named_parameters() if name != "output.weight"}
    gradients = [torch.autograd.grad(loss, list(trained.values())) for loss in (found, expected)]
    for name, one, other in zip(trained, *gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", KINDS)
def test_the_count_is_the_weight_of_the_labels_that_are_not_missing(kind: str) -> None:
    known = [sum(label == label for label in labels) for labels in LABELS[kind]]
    for weights, expected in ((True, WEIGHTS), (False, [1.0] * 3)):
        batch = batch_of(kind, weights)
        assert Prediction().count(batch) == sum(n * w for n, w in zip(known, expected, strict=True))
        assert Prediction().n_targets(batch) == sum(known)


@pytest.mark.parametrize("kind", KINDS)
def test_without_gradients_the_labelled_samples_predictions_are_there_in_their_order(kind: str) -> None:
    model, batch = LLM(args_of(kind), seed=1).eval(), batch_of(kind)
    with torch.no_grad():
        hidden = model(batch.inputs, return_hidden=True).hidden
        found = Prediction().loss_sum(model, hidden, batch).predictions
        assert torch.equal(found.outputs_Sn, model.predictions(hidden, batch.inputs)[LABELLED])
        torch.testing.assert_close(found.labels_SL, torch.tensor(LABELS[kind]), equal_nan=True)
        assert found.places_S.tolist() == [BOUNDS[document] for document in LABELLED]
    assert Prediction().loss_sum(model, hidden.requires_grad_(), batch).predictions is None


def test_a_batch_without_a_label_has_the_loss_0_and_gradients_of_0() -> None:
    model, batch = LLM(args_of("multilabel"), seed=1), batch_of("multilabel")
    targets = Targets(torch.full_like(batch.targets["prediction"].labels, IGNORE))
    loss = loss_of(model, replace(batch, targets={"prediction": targets}))
    loss.backward()
    assert loss.item() == 0 and model.prediction.weight.grad is not None
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_a_regressions_predictions_are_in_label_units_what_its_labels_were() -> None:
    args = args_of("regression")
    at_the_mean = in_units_of_labels(args, torch.tensor([[0.0, 1.0, -1.0]]))
    assert at_the_mean.tolist() == [[1.0, 0.0, 20.0]]


@pytest.mark.parametrize(
    ("kind", "label", "message"),
    [
        ("classification", 4.0, "label 4: model.prediction=classification takes whole numbers from 0 to 3"),
        ("classification", 0.5, "label 0.5: "),
        ("multilabel", -1.0, "label -1: model.prediction=multilabel takes whole numbers from 0 to 1"),
    ],
)
def test_labels_that_the_head_is_not_for_are_refused(kind: str, label: float, message: str) -> None:
    batch = batch_of(kind)
    batch.values["prediction.0"][0, 0] = label
    with pytest.raises(ValueError, match=message):
        loss_of(LLM(args_of(kind)), batch)


def test_as_many_labels_as_the_head_has_outputs_are_asked_for() -> None:
    with pytest.raises(ValueError, match=r"samples have 3 labels; model.n_prediction=4 with model.prediction=classi"):
        loss_of(LLM(args_of("classification")), batch_of("regression"))
    with pytest.raises(ValueError, match="n_prediction=0: the model has no prediction head"):
        loss_of(LLM(ModelArgs(**SHAPE)), batch_of("regression"))


def test_labels_come_in_the_order_of_their_numbers() -> None:
    values = {f"prediction.{k}": torch.full((1, 1), float(k)) for k in (10, 2, 0, 1, 9, 3, 4, 5, 6, 8, 7)}
    batch = Batch(TransformerInput(torch.zeros(1, 1, dtype=torch.int64)), {}, values=values | {"x": torch.zeros(1, 1)})
    assert labels_of(batch).tolist() == [[list(range(11))]]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"pool": "last"}, "model.pool=last: is of a prediction head, and model.n_prediction=0 has none"),
        ({"n_prediction": 1}, "model.n_prediction=1: a classification has 2 classes or more"),
        ({"n_prediction": 2, "prediction_std": (1.0, 1.0)}, r"model.prediction_std=\[1.0, 1.0\]: there must be one"),
        ({"n_prediction": 2, "prediction": "regression", "prediction_mean": (1.0,)}, "model.n_prediction=2 values"),
        ({"n_prediction": 1, "prediction": "regression", "prediction_std": (0.0,)}, "finite, and above 0"),
    ],
)
def test_a_head_that_cannot_be_is_refused_with_its_key(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelArgs(**SHAPE, **keys)


def test_a_model_without_a_head_says_nothing_of_one() -> None:
    written = ModelArgs(**SHAPE).model_dump()
    assert not {key for key in written if "predict" in key or key == "pool"}
    assert not [name for name in ParameterTable.of(ModelArgs(**SHAPE)) if "prediction" in name]


def test_the_head_begins_drawn_with_a_bias_of_0_and_trains_whole_beside_adapters_unless_it_is_frozen() -> None:
    args = args_of("classification", init_std=0.5, lora=LoraArgs(rank=2))
    model = LLM(args, seed=3)
    assert not model.prediction.bias.any() and 0.3 < model.prediction.weight.std().item() < 0.7
    table = ParameterTable.of(args)
    assert [table[f"prediction.{name}"].decay for name in ("weight", "bias")] == [True, False]
    alone = table.adapters_alone(int8=True)
    assert all(row.trainable == ("lora" in name or "prediction" in name) for name, row in alone.items())
    assert not alone.frozen(["prediction.*"])["prediction.weight"].trainable


def test_no_foreign_family_can_say_a_prediction_head() -> None:
    with pytest.raises(UserError, match=r"cannot say n_prediction \(4\), pool \(mean\), prediction \(classification\)"):
        choose_family(args_of("classification"), "hf", "llama")
    choose_family(ModelArgs(**SHAPE, rope_interleaved=False), "hf", "llama")


def test_prediction_is_a_task_with_label_smoothing() -> None:
    (objective,) = task_named("prediction").objectives({"label_smoothing": 0.2})
    assert isinstance(objective, Prediction) and objective.label_smoothing == 0.2
