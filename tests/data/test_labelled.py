"""Rows of a text and labels: from files of any form to rows, with what is missing, wrong or too long."""

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm.batch import IGNORE
from llm.data.augment import AUGMENTATIONS, Augmentation, register
from llm.data.labelled_rows import LabelledRows
from llm.data.labels import LabelOptions
from llm.data.opening import check_rows, open_rows, prepare_rows
from llm.data.sources import SourceSpec, sides
from llm.errors import UserError
from tests.data.helpers import flip_byte
from tests.data.sample_helpers import asked_for, write_rows

T = 16
TWO = LabelOptions("regression", 2)
ONE = LabelOptions("regression", 1)
CLASSES = LabelOptions("classification", 3)
BITS = LabelOptions("multilabel", 2)


def opened(path: Path | str, asked: Any, columns: dict[str, Any] | None = None, **more: Any) -> Any:
    """The training source of a path."""
    spec = SourceSpec(path=str(path), kind="labelled", columns=columns or {}, **more)
    (side,) = sides([spec], None).values()
    check_rows(side, asked.cache_dir)
    prepare_rows(side, asked)
    ((_, source, _),) = open_rows(side, asked)
    return source


def rows_of(path: Path | str, folder: Path, labels: LabelOptions, columns: Any = None, **more: Any) -> LabelledRows:
    """Its rows, of T positions."""
    rows = opened(path, asked_for(folder, T, labels=labels, **more), columns).rows
    assert isinstance(rows, LabelledRows)
    return rows


def samples(rows: LabelledRows, epoch: int = 0) -> dict[str, tuple[list[float], float]]:
    """Labels and weight of each sample, by its text, of all rows of a pass; checks where in a row they stand."""
    found = {}
    for k in range(rows.n_rows):
        row = rows.read(k, epoch)
        targets = row.targets["prediction"]
        at = np.flatnonzero(targets.labels == 0)
        assert at.tolist() == row.starts.tolist() and (np.delete(targets.labels, at) == IGNORE).all()
        assert set(row.values) == set(rows.values)
        for start, end in zip(at.tolist(), [*at[1:].tolist(), len(row.tokens)], strict=True):
            ids = row.tokens[start:end]
            values = [float(value[start]) for value in row.values.values()]
            assert not any(value[start + 1 : end].any() for value in row.values.values())
            weight = 1.0 if targets.weights is None else float(targets.weights[start])
            found[bytes(ids[ids < 256].astype(np.uint8)).decode()] = values, weight
    return found


def write_csv(path: Path, rows: Sequence[Sequence[object]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet", "arrow"])
def test_labels_of_all_forms_of_files_are_the_same(tmp_path: Path, form: str) -> None:
    smiles, logp, qed = ["CCO", "c1ccccc1", "N"], [0.5, None, -1.25], [1.0, 2.0, None]
    path = tmp_path / f"a.{form}"
    if form == "jsonl":
        lines = [{"smiles": a, "logp": b, "qed": c} for a, b, c in zip(smiles, logp, qed, strict=True)]
        lines[1]["logp"] = math.nan
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    elif form == "csv":
        write_csv(path, [("smiles", "logp", "qed"), *zip(smiles, logp, qed, strict=True)])
    else:
        table = pa.table({"smiles": smiles, "logp": logp, "qed": qed})
        if form == "parquet":
            pq.write_table(table, path)
        else:
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
    source = opened(path, asked_for(tmp_path, T, labels=TWO), {"text": "smiles", "label": ["logp", "qed"]})
    found = samples(source.rows)
    assert found.keys() == set(smiles) and found["CCO"] == ([0.5, 1.0], 1.0)
    assert np.isnan(found["c1ccccc1"][0]).tolist() == [True, False]
    assert np.isnan(found["N"][0]).tolist() == [False, True] and found["N"][0][0] == -1.25
    assert any("4 of 6 labels are there (missing: logp 1, qed 1)" in note for note in source.notes)


def test_a_text_is_wrapped_as_a_document_is_and_takes_all_of_its_tokens(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": "abc", "label": 1}, {"text": "de", "label": 2}])
    rows = rows_of(path, tmp_path, ONE)
    tokenizer = asked_for(tmp_path).tokenizer
    row = rows.read(0, 0)
    wrapped = [[*tokenizer.begin_ids, *tokenizer.encode(text), tokenizer.eos_id] for text in ("abc", "de")]
    assert rows.n_rows == 1 and row.tokens.tolist() == wrapped[0] + wrapped[1]
    assert [rows.origin(0, 0, at).origin.row for at in range(len(row.tokens))] == [1] * 5 + [2] * 4
    assert rows.origin(0, 0, 5).offset == 0 and rows.origin(0, 0, 4).length == 5


def test_one_column_may_hold_the_list_of_labels(tmp_path: Path) -> None:
    data = [{"text": "a", "label": [1, None]}, {"text": "b", "label": None}, {"text": "c", "label": [True, 0.0]}]
    rows = rows_of(write_rows(tmp_path / "a.jsonl", data), tmp_path, BITS)
    found = samples(rows)
    assert rows.labels.names == ("label.0", "label.1") and found["c"][0] == [1, 0]
    assert np.isnan(found["a"][0]).tolist() == [False, True] and np.isnan(found["b"][0]).all()
    assert rows.labels.unlabelled == 1 and rows.labels.missing == (1, 2)


def test_weights_stand_beside_the_labels(tmp_path: Path) -> None:
    data = [{"text": "a", "label": 1, "w": 0.5}, {"text": "b", "label": 2, "w": 0}, {"text": "c", "label": 3, "w": 2}]
    rows = rows_of(write_rows(tmp_path / "a.jsonl", data), tmp_path, ONE, {"weight": "w"})
    assert samples(rows) == {"a": ([1], 0.5), "b": ([2], 0), "c": ([3], 2)}


def test_classes_are_texts_or_integers_and_have_the_places_of_their_names(tmp_path: Path) -> None:
    data = [("text", "label"), ("a", "red"), ("b", "blue"), ("c", ""), ("d", "red")]
    rows = rows_of(write_csv(tmp_path / "a.csv", data), tmp_path, CLASSES)
    assert rows.labels.classes == ("red", "blue")
    rows.name_classes(("blue", "green", "red"))
    found = samples(rows)
    assert [found[text][0][0] for text in "abd"] == [2, 0, 2] and math.isnan(found["c"][0][0])
    numbers = [{"text": "a", "label": 2}, {"text": "b", "label": 0.0}, {"text": "c", "label": "1"}]
    rows = rows_of(write_rows(tmp_path / "n.jsonl", numbers), tmp_path, CLASSES)
    assert rows.labels.classes == ("2", "0", "1")


@pytest.mark.parametrize(
    ("labels", "row", "message"),
    [
        (ONE, {"text": "b", "label": "high"}, "its label 'label' is 'high', where a number must be"),
        (ONE, {"text": "b", "label": True}, "its label 'label' is True, where a number must be"),
        (ONE, {"text": "b", "label": [1]}, "its label 'label' is a list, where a number must be"),
        (ONE, {"text": "b", "label": 1e39}, "its label 'label' is 1e[+]39, which is out of the range of numbers"),
        (ONE, {"text": "b", "labels": 1}, "has no column 'label' for its label .see columns.; it has 'text', 'labels'"),
        (ONE, {"label": 1}, "has no column 'text' for its text"),
        (ONE, {"text": 3, "label": 1}, "its text is a number, not a text"),
        (ONE, {"text": "", "label": 1}, "its text is empty"),
        (BITS, {"text": "b", "label": [0, 2]}, "its label 'label.1' is 2, where 0 or 1 must be"),
        (BITS, {"text": "b", "label": [0, 1, 1]}, "its column 'label' has 3 labels, and model.n_prediction=2"),
        (BITS, {"text": "b", "label": 1}, "its column 'label' is 1, where a list of 2 labels must be"),
        (CLASSES, {"text": "b", "label": 1.5}, "its label 'label' is 1.5, where a class must be: a text or an integer"),
        (CLASSES, {"text": "b", "label": {}}, "its label 'label' is an object, where a class must be"),
    ],
)
def test_a_label_that_is_none_is_named_by_file_and_row(
    tmp_path: Path, labels: LabelOptions, row: Any, message: str
) -> None:
    good = {"text": "a", "label": [0, 1] if labels is BITS else 1}
    path = write_rows(tmp_path / "a.jsonl", [good, row])
    with pytest.raises(UserError, match=rf"^data\.train=.*a\.jsonl, line 2: {message}") as error:
        rows_of(path, tmp_path, labels)
    assert "\n" not in str(error.value) and not list((tmp_path / "cache").glob("*"))


@pytest.mark.parametrize("weight", [-1, "x", None, math.inf])
def test_a_weight_that_is_none_is_named_by_file_and_row(tmp_path: Path, weight: Any) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": "a", "label": 1, "w": weight}])
    with pytest.raises(UserError, match=r"a\.jsonl, line 1: its weight 'w' is .*, where a number from 0 to"):
        rows_of(path, tmp_path, ONE, {"weight": "w"})


def test_keys_that_do_not_fit_the_model_or_the_kind_are_named(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": "a", "label": 1}])
    for labels, columns, message in (
        (TWO, {"label": ["a", "b", "c"]}, r"label=\[.a., .b., .c.\]: names 3 columns, and model.n_prediction=2"),
        (CLASSES, {"label": ["a", "b"]}, "names 2 columns, and a classification has one label"),
        (TWO, {"label": ["a", "a"]}, "names a column twice"),
        (ONE, {"text": ["a", "b"]}, r"columns\.text=\['a', 'b'\]: is one column of kind labelled, not a list"),
        (ONE, {"value": "a"}, "columns.value: kind labelled has text, label, weight"),
    ):
        with pytest.raises(UserError, match=message):
            rows_of(path, tmp_path, labels, columns)
    with pytest.raises(UserError, match="the model predicts none .model.n_prediction."):
        opened(path, asked_for(tmp_path, T))


def test_a_file_without_any_label_is_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": "a", "label": None}, {"text": "b", "label": math.nan}])
    with pytest.raises(UserError, match=r"a\.jsonl: no label to train on in its 2 rows"):
        rows_of(path, tmp_path, ONE)


@pytest.mark.parametrize("how", ["error", "drop", "cut"])
def test_what_is_longer_than_a_row_is_refused_left_out_or_cut_after_its_beginning(tmp_path: Path, how: Any) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": "abc", "label": 1}, {"text": "x" * T, "label": 2}])
    labels = LabelOptions("regression", 1, max_length=how)
    if how == "error":
        with pytest.raises(UserError, match=r"longer than train.seq_len = 16 tokens: .*row 2 .*prediction.max_length"):
            rows_of(path, tmp_path, labels)
        return
    rows = rows_of(path, tmp_path, labels)
    found = samples(rows)
    assert found.keys() == ({"abc"} if how == "drop" else {"abc", "x" * (T - 1)})
    (listed,) = (tmp_path / "cache").glob(f"*/longer_than_{T}_{how}.jsonl")
    assert json.loads(listed.read_text())["row"] == 2
    note = "1 samples left out" if how == "drop" else "1 samples cut after their beginning"
    assert any(note in line and f"{path}, row 2 (18 tokens" in line for line in rows.notes())


def test_a_share_is_held_out_by_the_text_alone(tmp_path: Path) -> None:
    data = [{"text": f"text {i % 40}", "label": i} for i in range(80)]
    path = write_rows(tmp_path / "a.jsonl", data)
    texts = {}
    for role, side in sides([SourceSpec(path=path, kind="labelled")], 0.3).items():
        asked = asked_for(tmp_path, T, labels=ONE, split=side.split, held_out=role == "data.valid")
        prepare_rows(side, asked)
        ((_, source, _),) = open_rows(side, asked)
        texts[role] = set(samples(source.rows))
    assert len(texts["data.valid"]) > 3 and not texts["data.train"] & texts["data.valid"]


class Reversed(Augmentation):
    """Writes a text backwards half of the time, followed by a drawn letter."""

    name = "test_reversed"

    def written(self, text: str, draw: np.random.Generator) -> str:
        return text[:: 1 - 2 * int(draw.integers(2))] + "abcdefgh"[int(draw.integers(8))]


if Reversed.name not in AUGMENTATIONS:
    register(Reversed())


def test_texts_are_written_anew_by_seed_pass_and_row_alone(tmp_path: Path) -> None:
    data = [{"text": f"{i:02}xyz", "label": i} for i in range(30)] + [{"text": "y" * (T - 2), "label": 99}]
    path = write_rows(tmp_path / "a.jsonl", data)
    asked = asked_for(tmp_path, T, labels=ONE, packing="none")
    rows, again = (opened(path, asked, augment="test_reversed").rows for _ in range(2))
    epochs = [samples(rows, epoch) for epoch in range(3)]
    assert epochs == [samples(again, epoch) for epoch in (0, 1, 2)] and epochs[0] != epochs[1]
    for found in epochs:
        assert found["y" * (T - 2)] == ([99], 1.0), "longer than a row: read as it was"
        for text, (labels, _) in found.items():
            assert labels == [99] or f"{int(labels[0]):02}xyz" in (text[:-1], text[-2::-1])
    other = opened(path, asked_for(tmp_path, T, labels=ONE, packing="none", seed=1), augment="test_reversed").rows
    plain = opened(path, asked).rows
    assert samples(other) != epochs[0] and other.fingerprint == rows.fingerprint != plain.fingerprint
    held_out = asked_for(tmp_path, T, labels=ONE, packing="none", held_out=True)
    assert set(samples(opened(path, held_out, augment="test_reversed").rows)) == {row["text"] for row in data}


def test_an_augmentation_that_cannot_be_is_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": "a", "label": 1}])
    asked = asked_for(tmp_path, T, labels=ONE)
    with pytest.raises(UserError, match="texts of changing lengths cannot be packed; set data.packing to none"):
        opened(path, asked, augment="test_reversed")
    with pytest.raises(UserError, match=r"data\.train\.augment=other: no such augmentation; known are .*test_reversed"):
        opened(path, asked, augment="other")


def test_damaged_labels_are_found(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": "abc", "label": 1.25}, {"text": "de", "label": 3.5}])
    rows = rows_of(path, tmp_path, ONE)
    (shard,) = rows.source.path.glob("shards/*.arrow")
    flip_byte(shard, shard.read_bytes().index(np.array([1.25, 3.5], np.float32).tobytes()))
    with pytest.raises(UserError, match=r"damaged shard .*00000\.arrow: .*label"):
        rows_of(path, tmp_path, ONE).read(0, 0)
