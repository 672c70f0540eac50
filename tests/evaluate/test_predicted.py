"""Tasks of labels: what is asked and scored; answers are the model's own, whatever they are computed beside."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm import LLM, ModelArgs
from llm.errors import UserError
from llm.evaluate import evaluation
from llm.evaluate.encode import Encoder
from llm.evaluate.predicting import Predictor
from llm.evaluate.requests import NonFinite, Predict, Predicted, as_json, digest, from_json
from llm.evaluate.tasks import EvalTask
from llm.evaluate.tasks.asked import Head
from llm.jobs.evaluate import Evaluate
from llm.parallel.grid import make_grid
from llm.scorers import macro_f1, r2, roc_auc
from llm.tokenizers.simple import ByteTokenizer
from tests.evaluate.replicas import replica_of
from tests.evaluate.tasks import TOKENIZER, made

VALUES = Head("regression", ("x", "y"), 2)
CLASSES = Head("classification", ("blue", "green", "red"), 3)
KIND: dict[str, Any] = {"kind": "prediction"}
BITS = Head("multilabel", ("a", "b", "c"), 3)


def model_of(kind: Any = "regression", n: int = 2, **more: Any) -> LLM:
    args = ModelArgs(
        vocab_size=260, dim=32, n_layers=2, n_heads=2, n_kv_heads=1, ffn_hidden=48, max_seq_len=64,
        n_prediction=n, prediction=kind, **more,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LLM(args)
    with torch.no_grad():
        model.prediction.weight.normal_()
    return model


def result(task: EvalTask, head: Head, answers: Sequence[Sequence[float]]) -> dict[str, Any]:
    """What the task says where the model answers so."""
    found = task.documents(Encoder(TOKENIZER, 64), head=head)
    measures = [task.measure(one, [Predicted(tuple(said))]) for one, said in zip(found, answers, strict=True)]
    return task.result(found, measures)


def test_a_text_is_asked_as_it_is_trained_on_and_cut_after_its_beginning(tmp_path: Path) -> None:
    task = made(tmp_path, [{"text": "abc", "label": [1, None]}, {"text": "x" * 99, "label": [1, 2]}], **KIND)
    first, second = task.documents(Encoder(TOKENIZER, 64), head=VALUES)
    assert first.requests == (Predict((TOKENIZER.bos_id, *b"abc", TOKENIZER.eos_id)),)
    assert second.requests == (Predict((TOKENIZER.bos_id, *b"x" * 63)),)
    assert (first.counts["truncated"], second.counts["truncated"]) == (0, 1)
    assert first.gold == [1, None]


def test_values_are_scored_in_their_units_without_the_missing_ones(tmp_path: Path) -> None:
    rows = [{"t": "a", "x": 1.0, "y": 4}, {"t": "b", "x": "nan", "y": 2}, {"t": "c", "x": "3", "y": ""}]
    keys = {"kind": "prediction", "prompt": "{{ t }}", "gold": ["{{ x }}", "{{ y }}"]}
    found = result(made(tmp_path, rows, **keys), VALUES, [(2, 4), (9, 0), (3, 7)])
    assert found["n_labels"] == 4 and found["unlabelled"] == 0
    assert found["rmse"] == pytest.approx(math.sqrt((1 + 0 + 4 + 0) / 4)) and found["mae"] == pytest.approx(3 / 4)
    assert found["rmse/x"] == pytest.approx(math.sqrt(1 / 2)) and found["mae/y"] == 1
    assert found["r2"] == pytest.approx(np.mean([r2([1, 3], [2, 3]), r2([4, 2], [4, 0])])) and found["rmse_stderr"] > 0


def test_classes_are_scored_by_the_likeliest_and_each_against_the_others(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    places = draw.integers(0, 3, 30)
    said = draw.dirichlet(np.ones(3), 30)
    assert CLASSES.names is not None
    rows = [{"text": f"t{i}", "label": CLASSES.names[place]} for i, place in enumerate(places)]
    found = result(made(tmp_path, [*rows, {"text": "z", "label": None}], **KIND), CLASSES, [*said, (1, 0, 0)])
    assert found["n"] == 31 and found["n_labels"] == 30 and found["unlabelled"] == 1
    likeliest = said.argmax(1)
    assert found["accuracy"] == np.mean(places == likeliest)
    assert found["macro_f1"] == macro_f1(places, likeliest)
    of_each = [roc_auc((places == place).astype(float), said[:, place]) for place in range(3)]
    assert found["roc_auc"] == pytest.approx(np.mean(of_each))


def test_several_labels_are_the_mean_over_those_with_both_sorts_and_the_rest_is_counted(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    labels, said = draw.integers(0, 2, (40, 3)), draw.uniform(size=(40, 3))
    labels[:, 2] = 1
    rows = [{"text": f"t{i}", "label": row} for i, row in enumerate(labels.tolist())]
    found = result(made(tmp_path, rows, kind="prediction"), BITS, said.tolist())
    of_each = [roc_auc(labels[:, i], said[:, i]) for i in (0, 1)]
    assert found["roc_auc"] == pytest.approx(np.mean(of_each)) and found["labels_of_one_value"] == 1
    assert found["roc_auc/b"] == pytest.approx(of_each[1]) and found["roc_auc/c"] is None
    assert found["accuracy"] == pytest.approx(np.mean((said > 0.5) == labels))


@pytest.mark.parametrize(
    ("head", "rows", "keys", "message"),
    [
        (None, [{"text": "a", "label": 1}], {}, "the model has no prediction head"),
        (VALUES, [{"text": "a", "label": [1, 2]}], {"metrics": ["accuracy"]}, "accuracy is none of a regression"),
        (VALUES, [{"text": "a", "label": [1, 2]}], {"metrics": ["acc"]}, "prediction has no 'acc'; possible are acc"),
        (VALUES, [{"text": "a", "label": [1, 2]}, {"text": "b", "label": 1}], {}, "row 2: gold is a number, where"),
        (VALUES, [{"text": "a", "label": [1, 2, 3]}], {}, "row 1: gold has 3 labels, and the model predicts 2"),
        (VALUES, [{"text": "a", "label": [1, "x"]}], {}, "row 1: gold.1 is 'x', where a number must be"),
        (BITS, [{"text": "a", "label": [1, 0, 2]}], {}, "row 1: gold.2 is 2, where 0 or 1 must be"),
        (CLASSES, [{"text": "a", "label": "pink"}], {}, "row 1: gold is the class 'pink', and the model knows 'b"),
        (CLASSES, [{"text": "", "label": "red"}], {}, "row 1: prompt: the text is empty"),
        (CLASSES, [{"text": "a", "label": "red"}], {"description": "x"}, "description: kind prediction reads texts as"),
    ],
)
def test_what_cannot_be_asked_is_named(tmp_path: Path, head: Any, rows: Any, keys: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        made(tmp_path, rows, kind="prediction", **keys).documents(Encoder(TOKENIZER, 64), head=head)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("pool", ["mean", "first", "last"])
def test_answers_are_those_of_the_model_bit_for_bit_whatever_their_neighbours(pool: str) -> None:
    model = model_of(pool=pool, prediction_mean=(1.0, -2.0), prediction_std=(3.0, 0.5)).eval()
    draw = np.random.default_rng(0)
    texts = ["".join(draw.choice(list("abcde"), size=n)) for n in draw.integers(1, 60, 40)]
    model.tokenizer = ByteTokenizer()
    requests = {i: Predict(tuple(_ids(text))) for i, text in enumerate(texts)}
    found: list[dict[int, Predicted]] = []
    for batch_tokens in (1, 200, 100_000):
        predictor = Predictor(replica_of(model), requests)
        found.append({i: one for some in predictor.answers(predictor.batches(batch_tokens)) for i, one in some})
    assert found[0] == found[1] == found[2]
    ours = torch.tensor([found[0][i].predictions for i in range(len(texts))])
    # float32 sums over at most 60 tokens, in another order
    torch.testing.assert_close(model.predict(texts), ours.float(), rtol=1e-5, atol=1e-5)
    one = model.predict(texts, batch_tokens=100)[3]
    torch.testing.assert_close(one, model.predict(texts[3]), rtol=1e-5, atol=1e-5)


def _ids(text: str) -> list[int]:
    return [TOKENIZER.bos_id, *TOKENIZER.encode(text), TOKENIZER.eos_id]


def test_probabilities_are_what_the_head_says_of_classes_and_labels() -> None:
    for kind in ("classification", "multilabel"):
        model = model_of(kind, 3)
        model.tokenizer = ByteTokenizer()
        found = model.predict(["abc", "de"])
        assert found.shape == (2, 3) and bool(((found > 0) & (found < 1)).all())
        if kind == "classification":
            torch.testing.assert_close(found.sum(1), torch.ones(2))
    with pytest.raises(UserError, match="text 2 is empty"):
        model.predict(["a", ""])


def test_a_prediction_comes_back_from_the_journal_as_it_was() -> None:
    answer = Predicted((0.1, float(np.float32(1 / 3))))
    assert from_json(json.loads(json.dumps(as_json(answer)))) == answer
    assert digest(Predict((1, 2))) != digest(Predict((1, 3)))


def test_what_is_not_finite_is_refused_by_request() -> None:
    model = model_of()
    model.prediction.bias.data[1] = math.nan
    predictor = Predictor(replica_of(model), {7: Predict((1, 2))})
    with pytest.raises(NonFinite, match="what the prediction head makes of it is not finite"):
        list(predictor.answers(predictor.batches(100)))


def test_an_evaluation_writes_what_was_predicted_of_each_document(tmp_path: Path) -> None:
    model = model_of(prediction_names=("x", "y"), prediction_mean=(1.0, -2.0), prediction_std=(3.0, 0.5))
    model.save_pretrained(tmp_path / "model", tokenizer=ByteTokenizer())
    rows = [{"text": text, "label": [1, None]} for text in ("ab", "c", "ab")]
    made(tmp_path, rows, kind="prediction")
    words = ["--model", str(tmp_path / "model"), "--tasks", str(tmp_path / "t.yaml"), "--output", str(tmp_path / "out")]
    job = Evaluate.parse([*words, "--dtype=fp32"])
    assert "3 documents, 3 requests, 11 tokens" in job.report()
    evaluation.evaluate(job.flags.settings, make_grid(replica_of(model).world, job.layout))
    lines = [json.loads(line) for line in (tmp_path / "out" / "samples" / "t.jsonl").read_text().splitlines()]
    read = LLM.from_pretrained(tmp_path / "model")
    assert read.args == model.args, "names and scaling are kept with the model"
    expected = read.predict([row["text"] for row in rows])
    ours = torch.tensor([[line["predictions"][name] for name in ("x", "y")] for line in lines])
    torch.testing.assert_close(ours.float(), expected, rtol=1e-5, atol=1e-5)
    assert lines[0]["gold"] == [1, None] and lines[0]["responses"][0]["tokens"] == 4
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]["t"]
    assert results["mae"] == pytest.approx(float((expected[:, 0] - 1).abs().mean()), rel=1e-5)


def test_a_model_that_sees_both_ways_is_asked_for_labels_alone(tmp_path: Path) -> None:
    model = model_of(causal=False)
    model.save_pretrained(tmp_path / "model", tokenizer=ByteTokenizer())
    words = ["--model", str(tmp_path / "model"), "--tasks", str(tmp_path / "t.yaml"), "--output", str(tmp_path / "out")]
    made(tmp_path, [{"text": "ab", "label": [1, 2]}], kind="prediction")
    job = Evaluate.parse([*words, "--dtype=fp32"])
    evaluation.evaluate(job.flags.settings, make_grid(replica_of(model).world, job.layout))
    assert (tmp_path / "out" / "results.json").exists()
    made(tmp_path, [{"text": "ab"}], kind="perplexity")
    with pytest.raises(UserError, match=r"t.yaml: asks what follows a text, and the tokens of this model see what"):
        Evaluate.parse([*words, "--dtype=fp32"]).report()
    with pytest.raises(UserError, match="continues no text: its tokens see what follows them"):
        LLM.from_pretrained(tmp_path / "model").generate("ab")
