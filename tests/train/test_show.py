"""--show: rows as the model will see them, with what trains marked; and what launch/finetune.py does by itself."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launch import finetune, pretrain
from llm.jobs.finetune import Finetune
from llm.jobs.pretrain import Pretrain
from llm.tokenizer import ByteTokenizer
from llm.train.show import marked
from tests.data.sample_helpers import write_rows
from tests.distributed.harness import tiny_config, write_config

ROWS = [
    {"text": "ask:answer", "weights": [0] * 4 + [1] * 6},
    {"text": "two turns", "weights": [0, 0, 0, 1, 0, 0.5, 0.5, 0.5, 0]},
    {"text": "nothing here", "weights": [0] * 12},
]


def config_of(folder: Path, kind: str = "byte_samples", rows: list[dict[str, Any]] = ROWS, **sections: Any) -> Path:
    path = write_rows(folder / "rows.jsonl", rows)
    raw = tiny_config(folder, data={"train": [{"path": path, "kind": kind}], "valid": None}, **sections)
    raw |= {"extensions": ["tests/data/sample_helpers.py"], "task": "dpo" if kind == "byte_pairs" else "lm"}
    return write_config(folder / "config.yaml", raw)


def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], config: Path, *flags: str) -> list[str]:
    monkeypatch.setattr("sys.argv", ["finetune.py", "--config", str(config), *flags])
    finetune.main()
    assert not torch.distributed.is_initialized()
    return capsys.readouterr().out.splitlines()


def test_a_row_is_shown_sample_by_sample_with_what_trains_in_brackets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """29 tokens lie in 28 positions less one for each further sample: the last token of each is only a label."""
    lines = shown(monkeypatch, capsys, config_of(tmp_path), "--show", "1", f"--run_dir={tmp_path / 'run'}")
    first = next(i for i, line in enumerate(lines) if line.startswith("==="))
    assert lines[first] == (
        "=== row 1: row 1 of rows in pass 1; 28 of 48 positions used, 20 filled up; 3 samples, 10 targets"
    )
    heads, texts = lines[first + 1 :: 2], lines[first + 2 :: 2]
    of_row = {int(head.split(":")[1]): (head, text) for head, text in zip(heads, texts, strict=True)}
    assert of_row[1][1] == "ask:\u27e6answer\u27e7" and of_row[1][0].endswith(": 6 targets, 9 positions")
    assert of_row[2][1] == "two\u27e6 \u27e7t\u27e60.5:urn\u27e7"
    assert of_row[3][1] == "nothing her" and of_row[3][0].endswith(": 0 targets, 11 positions")
    assert not (tmp_path / "run").exists()


def test_answers_of_a_pair_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path, "byte_pairs", [{"one": "abc", "other": "xyz"}])
    lines = shown(monkeypatch, capsys, config, "--show=1")
    where = f"--- {tmp_path / 'rows.jsonl'}:1, pair 1"
    assert lines[-4:] == [
        f"{where}, chosen: 2 targets, 2 positions", "a\u27e6bc\u27e7",
        f"{where}, rejected: 2 targets, 2 positions", "x\u27e6yz\u27e7",
    ]  # fmt: skip


def test_control_tokens_are_shown_by_name_and_terminal_commands_not_at_all() -> None:
    tokenizer = ByteTokenizer()
    ids = np.array([tokenizer.bos_id, *b"a\x1b[2J\nb", tokenizer.eos_id])
    text = marked(ids, np.zeros(len(ids)), tokenizer, {tokenizer.bos_id: "<s>"})
    assert text == f"<s>a\ufffd[2J\nb<{tokenizer.eos_id}>"


def test_text_is_shown_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("0123456789" * 20)
    raw = tiny_config(tmp_path, data={"train": str(tmp_path / "a.txt"), "valid": None})
    monkeypatch.setattr("sys.argv", ["p", "--config", str(write_config(tmp_path / "c.yaml", raw)), "--show", "2"])
    pretrain.main()
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("===") for line in lines) == 2 and "48 of 48 positions" in lines[-3]
    assert "0123456789" in lines[-1]


@pytest.mark.parametrize("job", [Finetune, Pretrain])
def test_a_fine_tuning_validates_before_its_first_step_unless_the_config_says(
    tmp_path: Path, job: type[Pretrain]
) -> None:
    raw = tiny_config(tmp_path)
    given = write_config(tmp_path / "given.yaml", {**raw, "eval": {"at_start": False}})
    left_out = write_config(tmp_path / "left_out.yaml", raw)
    said = [job.parse(["--config", str(path)]).config.eval.at_start for path in (left_out, given)]
    assert said == [job is Finetune, False]


def test_labels_stand_above_their_text_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [{"s": "abc", "a": 1.5, "b": None, "w": 1}, {"s": "de", "a": 2.5, "b": 7, "w": 0.5}]
    columns = {"text": "s", "label": ["a", "b"], "weight": "w"}
    source = {"path": write_rows(tmp_path / "rows.jsonl", data), "kind": "labelled", "columns": columns}
    raw = tiny_config(tmp_path, data={"train": [source], "valid": None})
    raw["model"] |= {"n_prediction": 2, "prediction": "regression"}
    config = write_config(tmp_path / "config.yaml", raw | {"task": "prediction"})
    monkeypatch.setattr("sys.argv", ["pretrain.py", "--config", str(config), "--show", "1"])
    pretrain.main()
    lines = capsys.readouterr().out.splitlines()
    assert "output 0 is 'a', learned as (label - 2) / 0.5" in lines
    first = next(i for i, line in enumerate(lines) if line.startswith("==="))
    path = tmp_path / "rows.jsonl"
    assert lines[first + 1 : first + 5] == [
        f"--- {path}:1: a 1.5, b missing, 5 positions", "<s>abc</s>",
        f"--- {path}:2: a 2.5, b 7, weight 0.5, 4 positions", "<s>de</s>",
    ]  # fmt: skip
