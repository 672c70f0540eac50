"""Configs of runs on labels: what does not go together is one line naming the key, before anything is opened."""

from pathlib import Path
from typing import Any

import pytest

from llm.errors import UserError
from llm.train.config import RunConfig, validate
from llm.train.settle import labels_wanted
from tests.distributed.harness import tiny_config


def config(folder: Path, model: dict[str, Any], kind: str = "labelled", **top: Any) -> RunConfig:
    raw = tiny_config(folder, data={"train": [{"path": str(folder / "a.csv"), "kind": kind}], "valid": None})
    raw["model"] |= model
    return validate(raw | {"task": "prediction"} | top, "config.yaml")


def test_how_samples_are_read_is_kept_with_the_model(tmp_path: Path) -> None:
    head = {"n_prediction": 2}
    both, one_way = config(tmp_path, head), config(tmp_path, head, prediction={"causal": True, "max_length": "cut"})
    assert not both.model.prediction_causal and one_way.model.prediction_causal
    wanted = [labels_wanted(found) for found in (both, one_way)]
    assert [(found.causal, found.max_length) for found in wanted if found] == [(False, "error"), (True, "cut")]
    again = validate(one_way.model_dump(mode="json"), "config.yaml")
    assert again == one_way and labels_wanted(again) == wanted[1]


@pytest.mark.parametrize(
    ("model", "top", "message"),
    [
        ({}, {}, "task=prediction: the model has no head to predict with; set model.n_prediction"),
        ({"n_prediction": 2}, {"task": "lm"}, "data.train.0.kind=labelled: has labels of whole texts, which task=lm"),
        ({"n_prediction": 2}, {"task": "mlm"}, "data.train.0.kind=labelled: .* set task=prediction"),
        ({"n_prediction": 2}, {"kind": "text"}, "data.train.0.kind=text: task=prediction trains on kind labelled"),
        ({"n_prediction": 2}, {"prediction": {"max_length": "keep"}}, "prediction.max_length"),
        ({"n_prediction": 2, "prediction": "regression"}, {"prediction": {"label_smoothing": 0.1}}, "is for classes"),
        ({"n_prediction": 2, "prediction": "ranking"}, {}, "model.prediction"),
        ({"prediction_causal": True}, {"task": "lm", "kind": "text"}, "model.prediction_causal=True: is of a predict"),
        ({"n_prediction": 2}, {"task": "lm", "kind": "text", "prediction": {"causal": True}}, "is for task=prediction"),
    ],
)
def test_what_does_not_go_together_is_named_by_its_key(
    tmp_path: Path, model: dict[str, Any], top: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        config(tmp_path, model, **top)
    assert "\n" not in str(error.value)
