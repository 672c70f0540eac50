"""What the records of a training say of the model that it needs: classes, values, and how long a row is."""

from llm.data.labels import read_label
from llm.errors import UserError
from llm.siblings.miniformer_records import Record, column_of, records, text_in
from llm.siblings.miniformer_train import TrainConfig
from llm.tokenizer import Tokenizer

MARKS = 2
"""Begin and end mark of a row."""


def n_labels(train: TrainConfig) -> int:
    """How many classes the training rows have, or values a row. UserError naming file and line where a label is none,
    or where there are too few."""
    if train.task == "regression":
        return _n_values(train)
    names = {name for place, record in records(train.train_path) if (name := _class(record, train, place)) is not None}
    integers = all(name.lstrip("-").isdecimal() for name in names)
    found = max(map(int, names), default=0) + 1 if integers else len(names)
    if found < 2:
        has = ", ".join(sorted(names)) or "none"
        raise UserError(
            f"{train.train_path}: a classification has 2 classes or more; column {train.label_column!r} has {has}"
        )
    return found


def _class(record: Record, train: TrainConfig, place: str) -> str | None:
    label = column_of(record, train.label_column, place)
    try:
        name = read_label("classification", f"its {train.label_column}", label)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    return None if name is None else str(name)


def _n_values(train: TrainConfig) -> int:
    for place, record in records(train.train_path):
        label = column_of(record, train.label_column, place)
        if label is not None:
            return len(label) if isinstance(label, list) else 1
    raise UserError(f"{train.train_path}: no row has a value in column {train.label_column!r}")


def longest_record(train: TrainConfig, tokenizer: Tokenizer) -> int:
    """Tokens of the longest record of both files, marks included: of a pair those of its longer side."""
    longest = 0
    for path in filter(None, (train.train_path, train.val_path)):
        for place, record in records(path):
            lengths = [len(tokenizer.encode(text_in(record, column, place))) for column in train.text_columns]
            longest = max(longest, *lengths)
    if not longest:
        raise UserError(f"{train.train_path}: has no text")
    return longest + MARKS
