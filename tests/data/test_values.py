"""Rows of numbers: from files of any form to rows and windows, with what is missing, ragged or too long."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm.batch import IGNORE
from llm.data.batch import collate
from llm.data.heldout import HeldOut
from llm.data.labelled_rows import LabelledRows
from llm.data.labels import LabelOptions
from llm.data.learned import scaling_of
from llm.data.mixture import Mixture
from llm.data.opening import check_rows, look_at_rows, open_rows, prepare_rows
from llm.data.series_rows import SeriesRows
from llm.data.sources import SourceSpec, sides
from llm.data.values import ValueOptions
from llm.errors import UserError
from tests.data.helpers import flip_byte
from tests.data.sample_helpers import asked_for, write_rows

T = 8
SERIES = ValueOptions("autoregressive", 2)


def regression(width: int, n: int = 1, **more: Any) -> dict[str, Any]:
    labels = LabelOptions("regression", n, key="model.output_dim", **more)
    return {"labels": labels, "values": ValueOptions("regression", width)}


def opened(path: Path | str, folder: Path, columns: dict[str, Any] | None = None, **asked: Any) -> Any:
    spec = SourceSpec(path=str(path), kind="values", columns=columns or {})
    (side,) = sides([spec], None).values()
    wanted = asked_for(folder, T, **asked)
    check_rows(side, wanted.cache_dir)
    look_at_rows(side, wanted)
    prepare_rows(side, wanted)
    ((_, source, _),) = open_rows(side, wanted)
    return source.rows


def samples(rows: LabelledRows) -> list[tuple[list[list[float]], list[float]]]:
    """Values and labels of all samples of a pass, in the order of their values."""
    found = []
    for k in range(rows.n_rows):
        row = rows.read(k, 0)
        assert row.features is not None and len(row.features) == len(row.tokens) and not row.tokens.any()
        at = np.flatnonzero(row.targets["prediction"].labels == 0)
        assert at.tolist() == row.starts.tolist()
        assert (np.delete(row.targets["prediction"].labels, at) == IGNORE).all()
        for start, end in zip(at.tolist(), [*at[1:].tolist(), len(row.tokens)], strict=True):
            labels = [float(values[start]) for values in row.values.values()]
            found.append((row.features[start:end].tolist(), labels))
    return sorted(found, key=str)


def write_csv(path: Path, rows: list[list[object]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


ROWS = [[0.5, -1.0, 2.0], [1.5, 3.0, -4.0], [2.5, 0.25, 8.0]]
"""Two values and a label each."""


@pytest.mark.parametrize("form", ["csv", "parquet", "jsonl", "lists", "parquet lists"])
@pytest.mark.parametrize("width", [1, 2])
def test_samples_of_all_forms_of_files_are_the_same(tmp_path: Path, form: str, width: int) -> None:
    columns: dict[str, Any] = {"values": ["a", "b"], "label": "y"}
    names, path = ["a", "b", "y"], tmp_path / f"rows.{form.split()[0].replace('lists', 'jsonl')}"
    listed = [{"values": row[:2], "label": row[2]} for row in ROWS]
    if form == "csv":
        write_csv(path, [names, *ROWS])
    elif form == "parquet":
        pq.write_table(pa.table(dict(zip(names, np.array(ROWS).T, strict=True))), path)
    elif form == "jsonl":
        write_rows(path, [dict(zip(names, row, strict=True)) for row in ROWS])
    elif form == "lists":
        write_rows(path, listed)
    else:
        pq.write_table(pa.Table.from_pylist(listed), path)
    rows = opened(path, tmp_path, columns if "lists" not in form else {}, **regression(width))
    expected = [([[row[0]], [row[1]]] if width == 1 else [row[:2]], row[2:]) for row in ROWS]
    assert samples(rows) == sorted(expected, key=str)


def test_a_list_of_lists_is_a_position_each_and_a_label_may_be_a_list_with_gaps(tmp_path: Path) -> None:
    row = {"values": [[1, 2], [3, 4], [5, 6]], "label": [7, None]}
    ((values, (first, second)),) = samples(
        opened(write_rows(tmp_path / "a.jsonl", [row]), tmp_path, **regression(2, 2))
    )
    assert values == row["values"] and first == 7 and np.isnan(second)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"values": [1, None], "label": 1}, "its values: number 2 is missing .null."),
        ({"values": [1, float("nan")], "label": 1}, "its values: number 2 is missing .nan."),
        ({"values": [1, "x"], "label": 1}, "its values: number 2 is 'x', where a number must be"),
        ({"values": [1, True], "label": 1}, "its values: number 2 is True, where a number must be"),
        ({"values": [1, 1e39], "label": 1}, "its values: number 2 is 1e.39, which is out of the range of numbers"),
        ({"values": [1, 2, 3], "label": 1}, "its values has 3 numbers, and model.input_dim=2"),
        ({"values": [[1, 2], [3]], "label": 1}, "its values: position 2 has 1 numbers, and model.input_dim=2"),
        ({"values": [[1, 2], 3], "label": 1}, "its values: position 2 is 3, where a list of numbers must be"),
        ({"values": [[1, 2], [3, None]], "label": 1}, "its values: position 2: number 2 is missing"),
        ({"values": [], "label": 1}, "its values is empty, where numbers must be"),
        ({"x": [1, 2], "label": 1}, "has no column 'values' for its values"),
        ({"values": [1, 2]}, "has no column 'label' for its label"),
        ({"values": [1, 2], "label": "high"}, "its label 'label' is 'high', where a number must be"),
        ({"values": [1, 2], "label": [1, 2]}, "its label 'label' is a list"),
    ],
)
def test_a_row_that_is_wrong_is_named_with_its_file(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"values": [1, 2], "label": 1}, row])
    with pytest.raises(UserError, match=f"a.jsonl, line 2: {message}") as error:
        opened(path, tmp_path, **regression(2))
    assert "\n" not in str(error.value)


def test_a_cell_that_is_missing_is_named_with_its_row(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [["a", "b", "y"], [1, 2, 3], [4, "", 5]])
    for asked in (regression(2), {"values": SERIES}):
        with pytest.raises(UserError, match="a.csv, row 2: its b is missing"):
            opened(path, tmp_path, {"values": ["a", "b"], **({"label": "y"} if "labels" in asked else {})}, **asked)


def test_samples_longer_than_a_row_are_refused_left_out_or_cut(tmp_path: Path) -> None:
    rows = [{"values": list(range(n)), "label": n} for n in (3, 12)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match="set regression.max_length to drop or cut"):
        opened(path, tmp_path, **regression(1))
    dropped = samples(opened(path, tmp_path, **regression(1, max_length="drop")))
    cut = samples(opened(path, tmp_path, **regression(1, max_length="cut")))
    assert [labels for _, labels in dropped] == [[3.0]]
    assert [len(values) for values, _ in cut] == [8, 3] and cut[0][1] == [12.0]


def windows(rows: SeriesRows) -> list[tuple[list[float], list[float]]]:
    """What each window reads and predicts, of the first value, in order."""
    found = []
    for k in range(rows.n_rows):
        row = rows.read(k, 0)
        assert row.features is not None and (row.targets["autoregressive"].labels == 0).all()
        for start, end in zip(row.starts.tolist(), [*row.starts[1:].tolist(), len(row.tokens)], strict=True):
            following = row.values["autoregressive.0"][start:end].tolist()
            found.append((row.features[start:end, 0].tolist(), following))
    return sorted(found)


def series(n: int, first: int = 0) -> list[list[float]]:
    return [[float(first + i), float(-i)] for i in range(n)]


def test_a_long_series_is_cut_into_windows_that_predict_each_step_once(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"values": series(20)}, {"values": series(4, 100)}])
    rows = opened(path, tmp_path, values=SERIES)
    assert windows(rows) == [
        (list(range(8)), list(range(1, 9))),
        (list(range(8, 16)), list(range(9, 17))),
        ([16, 17, 18], [17, 18, 19]),
        ([100, 101, 102], [101, 102, 103]),
    ]
    assert rows.n_rows == 3, "the short ones share a row"


def test_windows_with_a_stride_overlap_and_end_with_the_series_and_held_out_ones_do_not(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"values": series(20)}])
    asked = {"values": ValueOptions("autoregressive", 2, 5)}
    assert [read[0] for read, _ in windows(opened(path, tmp_path, **asked))] == [0, 5, 10, 11]
    assert [read[0] for read, _ in windows(opened(path, tmp_path, held_out=True, **asked))] == [0, 8, 16]


def test_steps_of_a_table_are_a_series_and_origins_name_its_file(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [["a", "b"], *series(10)])
    rows = opened(path, tmp_path, {"values": ["a", "b"]}, values=SERIES)
    assert windows(rows) == [(list(range(8)), list(range(1, 9))), ([8], [9])]
    k = next(k for k in range(rows.n_rows) if rows.read(k, 0).features[0, 0] == 8)
    place = rows.origin(k, 0, 0)
    assert (place.offset, place.length, place.origin.file) == (8, 10, str(path))


@pytest.mark.parametrize(
    ("columns", "row", "message"),
    [
        ({"label": "y"}, {"values": [[1, 2]]}, r"columns.label: is for task=regression; of a series the next values"),
        ({}, {"values": [[1, 2]]}, "a.jsonl, line 1: has one step alone"),
        ({"text": "a"}, {"values": [[1, 2]]}, r"columns.text: kind values has values, label, weight"),
    ],
)
def test_what_is_no_series_is_refused(
    tmp_path: Path, columns: dict[str, Any], row: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        opened(write_rows(tmp_path / "a.jsonl", [row]), tmp_path, columns, values=SERIES)


def test_values_for_a_model_of_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rows of kind values are numbers, and the model reads none"):
        opened(write_rows(tmp_path / "a.jsonl", [{"values": [1]}]), tmp_path)


def test_a_damaged_shard_of_values_is_noticed(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"values": series(20)}])
    rows = opened(path, tmp_path, values=SERIES)
    (shard,) = (rows.source.path / "shards").iterdir()
    at = shard.read_bytes().index(np.float32(17).tobytes())
    flip_byte(shard, at)
    with pytest.raises(UserError, match="00000.arrow"):
        opened(path, tmp_path, values=SERIES).read(0, 0)


def test_batches_have_the_values_of_their_rows_and_0_where_there_is_none(tmp_path: Path) -> None:
    rows = opened(write_rows(tmp_path / "a.jsonl", [{"values": series(4)}]), tmp_path, values=SERIES)
    mixture = Mixture([("a", rows, 1.0)], T, 0)
    batch = collate([rows.read(0, 0), None], T, 0, None, mixture.targets, mixture.values, mixture.features)
    features = batch.inputs.features
    assert features is not None and features.shape == (2, T, 2)
    assert features[0, :3, 0].tolist() == [0, 1, 2] and not features[0, 3:].any() and not features[1].any()
    part = batch.span(1, 3).inputs
    assert part.features is not None and part.features[0, :, 0].tolist() == [1, 2]
    held_out = HeldOut([rows], T, None)
    assert all(found.inputs.features is not None for found in held_out.batches(2, 1, 2)), "also where no row is left"


def test_scales_are_mean_and_deviation_of_all_steps_and_1_of_what_never_changes() -> None:
    parts = [np.array([[1, 0.1], [3, 0.1]], np.float32), np.array([[8, 0.1]], np.float32)]
    found = scaling_of(parts)
    assert found.mean == pytest.approx((4, 0.1)) and found.std == pytest.approx((np.std([1, 3, 8]), 1))


def test_the_same_file_gives_other_samples_to_models_of_other_widths(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"values": [1, 2], "label": 0}) + "\n")
    one, two = (opened(path, tmp_path, **regression(width)) for width in (1, 2))
    assert one.fingerprint != two.fingerprint and (one.features, two.features) == (1, 2)
