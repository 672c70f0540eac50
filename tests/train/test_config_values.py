"""Configs of runs over values: no tokenizer, and what does not go together is one line naming the key."""

from pathlib import Path
from typing import Any

import pytest

from llm.errors import UserError
from llm.train.config import RunConfig, validate
from llm.train.settle import labels_wanted, values_wanted
from tests.distributed.harness import tiny_config

VALUES = {"input_dim": 2, "output_dim": 1}
SERIES = {"input_dim": 2, "output_dim": 2}


def config(folder: Path, model: dict[str, Any], task: str, kind: str = "values", **top: Any) -> RunConfig:
    raw = tiny_config(folder, data={"train": [{"path": str(folder / "a.csv"), "kind": kind}], "valid": None})
    del raw["tokenizer"]
    raw["model"] |= model
    return validate(raw | {"task": task} | top, "config.yaml")


def test_a_run_over_values_needs_no_tokenizer_and_its_config_is_read_again(tmp_path: Path) -> None:
    found = config(tmp_path, VALUES | {"causal": False}, "regression", regression={"max_length": "cut"})
    assert found.tokenizer.kind == "none" and validate(found.model_dump(mode="json"), "config.yaml") == found
    labels, values = labels_wanted(found), values_wanted(found)
    assert labels is not None and (labels.n, labels.max_length, labels.causal) == (1, "cut", False)
    assert values is not None and (values.task, values.width, values.stride) == ("regression", 2, None)
    strided = values_wanted(config(tmp_path, SERIES, "autoregressive", autoregressive={"stride": 3}))
    assert strided is not None and strided.stride == 3


@pytest.mark.parametrize(
    ("model", "task", "top", "message"),
    [
        ({}, "lm", {"kind": "text"}, "tokenizer"),
        ({}, "lm", {"kind": "text", "tokenizer": {"kind": "none"}}, "tokenizer.kind=none: a model of tokens needs a"),
        ({"input_dim": 2}, "regression", {"tokenizer": {"kind": "bytes"}}, "task=regression: .* set model.output_dim"),
        (SERIES, "lm", {"kind": "text"}, "model.input_dim=2: values are of the tasks regression and autoregressive"),
        (VALUES, "regression", {"kind": "labelled"}, "data.train.0.kind=labelled: task=regression trains on kind val"),
        ({}, "lm", {"tokenizer": {"kind": "bytes"}}, "data.train.0.kind=values: values are read by the tasks"),
        (VALUES, "autoregressive", {}, "model.output_dim=1: task=autoregressive predicts the next values of what it r"),
        (SERIES | {"causal": False}, "autoregressive", {}, "model.causal=false: task=autoregressive"),
        (SERIES, "autoregressive", {"autoregressive": {"stride": 0}}, "autoregressive.stride"),
        (SERIES, "autoregressive", {"regression": {"max_length": "cut"}}, "regression.max_length=cut: is for task=reg"),
        (VALUES, "regression", {"tokenizer": {"kind": "none", "path": "a"}}, "tokenizer.kind=none"),
    ],
)
def test_what_does_not_go_together_is_named_by_its_key(
    tmp_path: Path, model: dict[str, Any], task: str, top: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        config(tmp_path, model, task, **top)
    assert "\n" not in str(error.value)
