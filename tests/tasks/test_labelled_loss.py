"""Labelled samples side by side in rows: the loss and the gradients of each are those that it has alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm import LLM, ModelArgs
from llm.data.batch import collate
from llm.data.labelled_rows import LabelledRows
from llm.data.labels import LabelOptions
from llm.tasks.prediction import Prediction
from llm.tasks.settle_labels import settled_labels
from tests.data.sample_helpers import write_rows
from tests.data.test_labelled import rows_of

T = 16


def summed(rows: LabelledRows, model: LLM) -> tuple[float, float, torch.Tensor]:
    """(sum of losses, count, gradient of the token table) over a pass, two rows at a time."""
    objective, losses, count = Prediction(), [], 0.0
    model.zero_grad()
    for k in range(0, rows.n_rows, 2):
        found = [rows.read(i, 0) if i < rows.n_rows else None for i in (k, k + 1)]
        batch = collate(found, T, targets=rows.targets, values=rows.values)
        assert batch.inputs.causal is rows.causal
        hidden = model(batch.inputs, return_hidden=True).hidden
        total = objective.loss_sum(model, hidden, batch).total
        total.backward()
        losses.append(float(total.detach()))
        count += objective.count(batch)
    gradient = model.tok_embeddings.weight.grad
    assert gradient is not None
    return sum(losses), count, gradient.clone()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["classification", "regression", "multilabel"])
def test_a_packed_sample_has_the_loss_that_it_has_alone(tmp_path: Path, kind: Any, causal: bool) -> None:
    draw = np.random.default_rng(0)
    data = []
    for i in range(40):
        text = "".join(draw.choice(list("abc"), size=draw.integers(1, T - 1)))
        labels = {"classification": int(draw.integers(3)), "regression": draw.normal(9, 3, 3).tolist(),
                  "multilabel": draw.integers(0, 2, 3).tolist()}[kind]  # fmt: skip
        if i % 6 == 5:
            labels = None
        data.append({"text": text, "label": labels, "w": float(draw.integers(0, 4)) / 2})
    path = write_rows(tmp_path / "a.jsonl", data)
    args = ModelArgs(
        vocab_size=260, dim=16, n_layers=2, n_heads=2, n_kv_heads=1, ffn_hidden=32, max_seq_len=T,
        n_prediction=3, prediction=kind, prediction_causal=causal,
    )  # fmt: skip
    options = LabelOptions(kind, 3, max_length="cut", causal=causal)
    found = []
    for packing in ("best_fit", "none"):
        rows = rows_of(path, tmp_path, options, {"weight": "w"}, packing=packing)
        model = LLM(settled_labels(args, [rows], [], None), seed=0)
        found.append((rows.n_rows, *summed(rows, model)))
    (few, loss, count, gradient), (many, alone, count_alone, gradient_alone) = found
    assert few < many == 40 and count == count_alone
    assert loss == pytest.approx(alone, rel=1e-5)
    torch.testing.assert_close(gradient, gradient_alone, rtol=1e-4, atol=1e-6)  # float32 sums in another order
    known = sum(row["w"] * (1 if kind == "classification" else 3) for row in data if row["label"] is not None)
    assert count == known, json.dumps(data)
