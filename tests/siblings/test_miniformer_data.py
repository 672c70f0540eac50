"""Records of JSON Lines as items and batches: what is in them, and which record is wrong."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from llm.errors import UserError
from llm.siblings.miniformer import JSONLinesDataset
from llm.tokenizer import TokenizerConfig, load_tokenizer

BYTES = load_tokenizer(TokenizerConfig(kind="bytes"))
BEGIN, END = BYTES.begin_ids, BYTES.eos_id


def written(folder: Path, *rows: Any) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def test_a_text_of_language_modelling_is_learned_token_by_token_with_its_marks(tmp_path: Path) -> None:
    data = JSONLinesDataset(written(tmp_path, {"text": "ab"}, {"text": "cde"}), "bytes")
    whole = [*BEGIN, *b"ab", END]
    assert len(data) == 2 and data[0]["input_ids"].tolist() == whole[:-1] and data[0]["labels"].tolist() == whole[1:]


def test_a_text_for_an_encoder_decoder_is_split_in_its_middle(tmp_path: Path) -> None:
    item = JSONLinesDataset(written(tmp_path, {"text": "abcde"}), BYTES, model="seq2seq")[0]
    assert item["input_ids"].tolist() == [*BEGIN, *b"ab", END]
    assert item["decoder_input_ids"].tolist() == [BYTES.bos_id, *b"cde"] and item["labels"].tolist() == [*b"cde", END]


def test_a_pair_is_a_source_and_a_target_that_begins_with_its_mark(tmp_path: Path) -> None:
    rows = written(tmp_path, {"question": "ab", "answer": "c"})
    data = JSONLinesDataset(rows, BYTES, "seq2seq", model="seq2seq", source_column="question", target_column="answer")
    assert data[0]["input_ids"].tolist() == BYTES.source_ids("ab")
    assert data[0]["decoder_input_ids"].tolist() == [BYTES.bos_id, *b"c"] and data[0]["labels"].tolist() == [*b"c", END]


def test_classes_are_numbered_by_name_or_as_the_integers_that_they_are(tmp_path: Path) -> None:
    rows = [{"text": "x", "label": label} for label in ("red", "blue", None, "red")]
    data = JSONLinesDataset(written(tmp_path, *rows), BYTES, "classification")
    assert data.classes == ("blue", "red") and [int(item["labels"]) for item in data] == [1, 0, -100, 1]  # type: ignore[attr-defined]
    same = JSONLinesDataset(written(tmp_path, *rows[:1]), BYTES, "classification", classes=data.classes)
    assert int(same[0]["labels"]) == 1, "held-out rows have the places of the training rows"
    numbers = written(tmp_path, {"text": "x", "label": 3}, {"text": "x", "label": 0})
    assert JSONLinesDataset(numbers, BYTES, "classification").classes == ("0", "1", "2", "3")


def test_values_are_one_or_several_and_may_be_missing(tmp_path: Path) -> None:
    rows = {"text": "x", "label": 0.5}, {"text": "y", "label": None}
    data = JSONLinesDataset(written(tmp_path, *rows), BYTES, "regression")
    assert data[0]["labels"].tolist() == [0.5] and math.isnan(data[1]["labels"].item())
    several = JSONLinesDataset(written(tmp_path, {"text": "x", "label": [1, 2.5]}), BYTES, "regression")
    assert several[0]["labels"].tolist() == [1.0, 2.5] and several[0]["labels"].dtype == torch.float32


def test_a_batch_is_padded_behind_with_masks_and_labels_that_do_not_count(tmp_path: Path) -> None:
    data = JSONLinesDataset(written(tmp_path, {"text": "abcd"}, {"text": "x"}), BYTES, model="seq2seq")
    (batch,) = DataLoader(data, batch_size=2, collate_fn=data.collate)
    more = len(BEGIN)
    assert batch["attention_mask"].tolist() == [[1] * (more + 3), [1] * (more + 1) + [0, 0]], "x is its target alone"
    assert batch["decoder_attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[*b"cd", END], [*b"x", END, -100]]


def test_a_text_that_is_too_long_keeps_its_beginning_and_is_counted(tmp_path: Path) -> None:
    data = JSONLinesDataset(written(tmp_path, {"text": "abcdef"}, {"text": "ab"}), BYTES, max_length=3)
    assert data.n_cut == 1 and len(data[0]["input_ids"]) == len(data[0]["labels"]) == 3
    assert data[0]["labels"].tolist() == [*BEGIN, *b"abcd"][1:4]


@pytest.mark.parametrize(
    ("rows", "how", "line"),
    [
        ([{"text": "a"}, {"body": "b"}], {}, r"rows.jsonl, line 2: has no column 'text'; it has 'body'"),
        ([{"text": 7}], {}, r"rows.jsonl, line 1: its text is a number, not a text"),
        ([["text"]], {}, r"rows.jsonl, line 1: is a list, where an object of columns must be"),
        ([], {}, r"rows.jsonl: has no records"),
        ([{"text": "a", "label": 1}, {"text": "b", "label": [2]}], {"task": "classification"}, r"line 2: its label is"),
        ([{"text": "a", "label": "x"}], {"task": "classification", "classes": ["y"]}, r"the class 'x', which is none"),
        ([{"text": "a", "label": "x"}], {"task": "regression"}, r"line 1: its label is 'x'"),
        ([{"text": "a", "label": [1, 2]}, {"text": "a", "label": 3}], {"task": "regression"}, r"line 2: its label has"),
        ([{"source": "a"}], {"task": "seq2seq", "model": "seq2seq"}, r"line 1: has no column 'target'"),
    ],
)
def test_a_wrong_record_is_named_by_its_line(tmp_path: Path, rows: list[Any], how: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line) as error:
        JSONLinesDataset(written(tmp_path, *rows), BYTES, **how)
    assert "\n" not in str(error.value)


def test_json_that_is_broken_is_named_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(UserError, match="rows.jsonl, line 2: not JSON"):
        JSONLinesDataset(tmp_path / "rows.jsonl", BYTES)
    with pytest.raises(UserError, match=r"none.jsonl: No such file"):
        JSONLinesDataset(tmp_path / "none.jsonl", BYTES)


def test_a_task_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a task is language_modeling, classification, regression or seq2seq"):
        JSONLinesDataset(written(tmp_path, {"text": "a"}), BYTES, "translation")  # type: ignore[arg-type]
