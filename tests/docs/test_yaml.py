"""Every YAML block is something that Lattice reads: a run config, sections of one, model keys, or a task file."""

import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from llm import extensions
from llm.args import ModelArgs
from llm.args.layers import ACTIVATIONS, FFNS, MIXERS, POSITIONS
from llm.evaluate.tasks import KINDS
from llm.train.config import RunConfig, validate
from llm.train.config.yaml_file import read_yaml
from tests.docs.pages import Block, all_blocks
from tests.docs.worlds import SMALL, stand_in

BASE: dict[str, Any] = {"model": SMALL, "tokenizer": {"kind": "bytes"}, "data": {"train": "text.jsonl"},
                        "train": {"seq_len": 16}}  # fmt: skip
"""A run into which sections are put; what a block says itself stands in its place."""


def loaded(block: Block, folder: Path) -> Any:
    """What a block says; `...`, for what a reader fills in, is left out."""
    file = folder / "block.yaml"
    file.write_text(re.sub(r",?\s*\.\.\.", "", block.text))
    return read_yaml(file)


def merged(base: Any, given: Any) -> Any:
    if not (isinstance(base, dict) and isinstance(given, dict)):
        return given
    return {**base, **{key: merged(base.get(key), value) for key, value in given.items()}}


@pytest.mark.parametrize("block", all_blocks("yaml"), ids=lambda block: block.place)
def test_yaml_is_read(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch)
    for table in (ACTIVATIONS, FFNS, MIXERS, POSITIONS):
        monkeypatch.setattr(table, "_entries", dict(table))
    monkeypatch.setattr(extensions, "LOADED", set())
    monkeypatch.setattr("llm.objectives.FACTORIES", {})
    read = loaded(block, tmp_path)
    assert isinstance(read, dict) and read, "a block shows keys"
    if set(read) <= set(RunConfig.model_fields):
        validate(merged(_base(read), read), block.place)
    elif set(read) <= set(ModelArgs.model_fields):
        ModelArgs.model_validate(merged(_base({"model": dict(read)})["model"], read))
    else:
        assert "kind" in read, f"neither a run config nor a model nor a task: {', '.join(read)}"
        task = KINDS[read["kind"]]
        task.schema.model_validate({key: value for key, value in read.items() if key in task.schema.model_fields})
        assert set(read) <= set(task.schema.model_fields) | {"kind"}


def _base(read: dict[str, Any]) -> dict[str, Any]:
    """The run around a block: a small model, and of what the block leaves open what goes with what it says."""
    base = deepcopy(BASE)
    model = read.get("model") or {}
    if isinstance(model, str):
        read["model"] = model = yaml.safe_load(Path(model).read_text())
    data, keys = read.get("data") or {}, base["model"] | {"max_seq_len": 1 << 20}
    sources = data.get("train") if isinstance(data.get("train"), list) else []
    kinds = {source.get("kind", "text") for source in sources if isinstance(source, dict)}
    best = str((read.get("eval") or {}).get("best", ""))
    if "task" not in read:
        base["task"] = next((TASK_OF[kind] for kind in kinds if kind in TASK_OF), "lm")
    if best.startswith("valid_roc") and "task" not in read:
        base |= {"task": "prediction", "data": {"train": [{"path": "rows.csv", "kind": "labelled"}], "valid": 0.1}}
    task = read.get("task", base.get("task"))
    keys |= {"n_prediction": 2} if task == "prediction" else {"encoder_layers": 1} if task == "seq2seq" else {}
    if "eval" in read and "valid" not in data:
        base["data"].setdefault("valid", 0.1)
    if "dim" in model:  # widths go with it
        keys = {key: value for key, value in keys.items() if key != "ffn_hidden"}
    return base | {"model": keys}


TASK_OF = {"labelled": "prediction", "pair": "seq2seq", "preference": "dpo"}
