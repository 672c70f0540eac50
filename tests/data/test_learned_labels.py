"""What training rows decide of a model with labels: classes' names and places, the scaling of values."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm import ModelArgs
from llm.args.model import same_head
from llm.data.labelled_rows import LabelledRows
from llm.data.labels import LabelOptions
from llm.data.learned import scaling
from llm.errors import UserError
from llm.tasks.settle_labels import settled_labels
from tests.data.sample_helpers import write_rows
from tests.data.test_labelled import rows_of, samples


def args_of(kind: Any, n: int, **more: Any) -> ModelArgs:
    return ModelArgs(vocab_size=260, dim=16, n_layers=1, n_heads=2, prediction=kind, n_prediction=n, **more)


def labelled(folder: Path, kind: Any, n: int, labels: list[Any], name: str = "a", **more: Any) -> LabelledRows:
    """Rows of texts 0, 1, .. with these labels."""
    path = write_rows(folder / f"{name}.jsonl", [{"text": str(i), "label": label} for i, label in enumerate(labels)])
    return rows_of(path, folder, LabelOptions(kind, n), **more)


def settled(args: ModelArgs, train: LabelledRows, *valid: LabelledRows, began_from: Any = None) -> ModelArgs:
    return settled_labels(args, [train], valid, began_from)


def test_the_scaling_is_that_of_the_labels_that_are_there_whatever_rows_they_share(tmp_path: Path) -> None:
    drawn = np.random.default_rng(0).normal(3, 2, 50).astype(np.float32).tolist()
    labels = [[x, None if i % 3 else i] for i, x in enumerate(drawn)]
    packed = labelled(tmp_path, "regression", 2, labels)
    found = settled(args_of("regression", 2), packed)
    assert found == settled(args_of("regression", 2), labelled(tmp_path, "regression", 2, labels, packing="none"))
    columns = [np.array([label[i] for label in labels if label[i] is not None]) for i in (0, 1)]
    # sums of 50 float64 numbers: their order alone may differ
    assert found.prediction_mean == pytest.approx([column.mean() for column in columns], rel=1e-14)
    assert found.prediction_std == pytest.approx([column.std() for column in columns], rel=1e-14)
    assert found.prediction_names == ("label.0", "label.1")


def test_labels_that_are_all_the_same_are_only_moved_and_ones_that_are_not_there_refused(tmp_path: Path) -> None:
    rows = labelled(tmp_path, "regression", 2, [[3, None], [3, None]])
    assert scaling([labelled(tmp_path, "regression", 1, [3, 3], "b")]).std == (1.0,)
    with pytest.raises(UserError, match=r"a\.jsonl: no row has the label 'label.1', so it cannot be learned"):
        settled(args_of("regression", 2), rows)


def test_what_the_config_says_stays(tmp_path: Path) -> None:
    rows = labelled(tmp_path, "regression", 1, [1, 2])
    args = args_of("regression", 1, prediction_names=("x",), prediction_mean=(5.0,))
    found = settled(args, rows)
    assert found.prediction_names == ("x",) and found.prediction_mean == (5.0,) and found.prediction_std == (0.5,)


def test_a_model_to_begin_with_gives_its_scaling_where_its_head_is_the_same(tmp_path: Path) -> None:
    rows = labelled(tmp_path, "regression", 1, [1, 2])
    there = args_of("regression", 1, prediction_names=("label",), prediction_mean=(7.0,), prediction_std=(9.0,))
    assert settled(args_of("regression", 1), rows, began_from=there) == there
    other = there.model_copy(update={"prediction_names": ("weight",)})
    found = settled(args_of("regression", 1), rows, began_from=other)
    assert found.prediction_mean == (1.5,) and not same_head(found, other) and same_head(found, there)


def test_classes_are_sorted_names_of_the_training_rows(tmp_path: Path) -> None:
    train = labelled(tmp_path, "classification", 3, ["red", "blue", None, "green", "red"])
    valid = labelled(tmp_path, "classification", 3, ["green", "red"], "b", held_out=True)
    found = settled(args_of("classification", 3), train, valid)
    assert found.prediction_names == ("blue", "green", "red") and found.prediction_mean is None
    assert [samples(valid)[text][0] for text in "01"] == [[1], [2]]
    labels = [samples(train)[text][0][0] for text in "01234"]
    assert labels[:2] + labels[3:] == [2, 0, 1, 2] and math.isnan(labels[2])


def test_integers_are_the_places_themselves(tmp_path: Path) -> None:
    train = labelled(tmp_path, "classification", 11, [10, 2, "0"])
    assert settled(args_of("classification", 11), train).prediction_names == tuple(map(str, range(11)))
    assert [samples(train)[text][0] for text in "012"] == [[10], [2], [0]]
    with pytest.raises(UserError, match=r"a\.jsonl, row 1: has the class '10'; .* integers go from 0 to 9"):
        settled(args_of("classification", 10), train)


def test_names_of_the_model_to_begin_with_stay_where_they_hold_all_classes(tmp_path: Path) -> None:
    there = args_of("classification", 3, prediction_names=("z", "y", "x"))
    train = labelled(tmp_path, "classification", 3, ["x", "y"])
    assert settled(args_of("classification", 3), train, began_from=there) == there
    other = labelled(tmp_path, "classification", 3, ["x", "y", "w"], "b")
    found = settled(args_of("classification", 3), other, began_from=there)
    assert found.prediction_names == ("w", "x", "y") and not same_head(found, there)


@pytest.mark.parametrize(
    ("n", "train", "valid", "message"),
    [
        (2, ["a", "b", "c"], [], r"a\.jsonl, row 3: has the class 'c', number 3 of them where model.n_prediction=2"),
        (3, ["a", "b"], [], r"the classes of the training rows are 'a', 'b', which are 2, and model.n_prediction=3"),
        (2, ["a", "b"], ["a", "d"], r"b\.jsonl, row 2: has the class 'd'; the model knows 'a', 'b'"),
        (2, [0, 1, -1], [], r"a\.jsonl, row 3: has the class '-1'; classes that are integers go from 0 to 1"),
    ],
)
def test_a_class_that_cannot_be_is_named_by_file_and_row(
    tmp_path: Path, n: int, train: list[Any], valid: list[Any], message: str
) -> None:
    rows = labelled(tmp_path, "classification", n, train)
    held_out = [labelled(tmp_path, "classification", n, valid, "b", held_out=True)] if valid else []
    with pytest.raises(UserError, match=message) as error:
        settled(args_of("classification", n), rows, *held_out)
    assert "\n" not in str(error.value)


def test_names_and_scales_of_other_numbers_than_outputs_are_refused() -> None:
    with pytest.raises(ValueError, match="model.prediction_names=.*a name for each of the .*=2 outputs"):
        args_of("classification", 2, prediction_names=("a", "a"))
