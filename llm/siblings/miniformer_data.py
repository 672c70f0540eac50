"""`JSONLinesDataset`: records of JSON Lines as tensors for a loop of one's own, or for Lightning; all are read, checked
and encoded when it is made, so that a wrong record is said by its line before the first step.

Shapes: B records, T tokens of the longest one, S of the longest source, n values of a record.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from llm.args.layers import either
from llm.batch import IGNORE
from llm.data.labels import read_label
from llm.errors import UserError
from llm.siblings.miniformer_records import Record, column_of, records, text_in
from llm.siblings.miniformer_tokenizer import named
from llm.siblings.miniformer_train import CHOICES, ModelName, TaskName
from llm.tokenizer import Tokenizer, load_tokenizer

Item = dict[str, Tensor]
MASKS = {"input_ids": "attention_mask", "decoder_input_ids": "decoder_attention_mask"}
"""What a batch has beside tokens of different lengths: 1 = token, 0 = padding."""


class JSONLinesDataset(Dataset[Item]):
    """Records of one file, for one task.

    | task, model | an item | labels |
    |---|---|---|
    | language_modeling | input_ids (T,) | (T,) the tokens after them |
    | language_modeling, seq2seq; seq2seq | input_ids (S,), decoder_input_ids (T,) | (T,) the tokens after the latter |
    | classification | input_ids (T,) | () the place of the class; -100 where the record has none |
    | regression | input_ids (T,) | (n,) float32; NaN where the record has none |
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: Tokenizer | str | Path,
        task: TaskName = "language_modeling",
        *,
        model: ModelName = "encoder",
        max_length: int | None = None,
        classes: Sequence[str] | None = None,
        text_column: str = "text",
        label_column: str = "label",
        source_column: str = "source",
        target_column: str = "target",
    ) -> None:
        """tokenizer: one, or the path of one. max_length: tokens of an item; longer ones keep their beginning, and are
        counted in `n_cut`; None = all are kept. classes: names of the classes in the order of their places, as another
        file has them (`dataset.classes`); None = of this file, integers from 0 or names in order.

        UserError naming the file and line where a record is none of the task's; ValueError for an unknown task.
        """
        if task not in CHOICES["task"] or model not in CHOICES["model"]:
            raise ValueError(f"task={task!r}, model={model!r}: a task is {either(CHOICES['task'])}, a model "
                             f"{either(CHOICES['model'])}")  # fmt: skip
        if max_length is not None and max_length < 2:
            raise ValueError(f"max_length={max_length} must be at least 2")
        self.path, self.task, self.max_length, self.n_cut = str(path), task, max_length, 0
        opened = load_tokenizer(named(str(tokenizer))) if isinstance(tokenizer, str | Path) else tokenizer
        self.tokenizer: Tokenizer = opened
        self.of_pairs = task == "seq2seq" or task == "language_modeling" and model == "seq2seq"
        self._columns = {"text": text_column, "label": label_column, "source": source_column, "target": target_column}
        self._items: list[dict[str, Any]] = []
        found: list[str | None] = []
        self.n_values: int | None = None
        """Values of a record, of a regression."""
        for place, record in records(path):
            item = self._pair(record, place) if self.of_pairs else self._text(record, place)
            if task == "classification":
                found.append(self._class(record, place))
            elif task == "regression":
                item["labels"] = self._values(record, place)
            self._items.append(item)
        if not self._items:
            raise UserError(f"{path}: has no records")
        self.classes: tuple[str, ...] = ()
        """Names of the classes, in the order of their places."""
        if task == "classification":
            self.classes = _places(found) if classes is None else tuple(classes)
            self._take_classes(found)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Item:
        return {key: torch.tensor(value) for key, value in self._items[index].items()}

    def collate(self, items: Sequence[Item]) -> Item:
        """A batch: tokens padded behind with 0, masks (B, T) int64 of where there are tokens, labels padded with -100.
        """
        batch = {}
        for key in items[0]:
            of_tokens = items[0][key].ndim == 1 and not items[0][key].is_floating_point()
            if not of_tokens:
                batch[key] = torch.stack([item[key] for item in items])
                continue
            filler = IGNORE if key == "labels" else 0
            batch[key] = pad_sequence([item[key] for item in items], batch_first=True, padding_value=filler)
            if key in MASKS:
                ones = [torch.ones(len(item[key]), dtype=torch.int64) for item in items]
                batch[MASKS[key]] = pad_sequence(ones, batch_first=True)
        return batch

    def _text(self, record: Record, place: str) -> dict[str, Any]:
        """A text between its marks, and of language modelling what comes after each token."""
        tokenizer = self.tokenizer
        ids = [*tokenizer.begin_ids, *tokenizer.encode(text_in(record, self._columns["text"], place)), tokenizer.eos_id]
        if self.task != "language_modeling":
            return {"input_ids": self._cut(ids)}
        if len(ids) < 2:
            raise UserError(f"{place}: its {self._columns['text']} is empty, and without a begin mark predicts nothing")
        ids = self._cut(ids, 1)
        return {"input_ids": ids[:-1], "labels": ids[1:]}

    def _pair(self, record: Record, place: str) -> dict[str, Any]:
        """A source and its target, or the two halves of a text."""
        tokenizer = self.tokenizer
        if self.task == "seq2seq":
            columns = self._columns["source"], self._columns["target"]
            source, target = (tokenizer.encode(text_in(record, column, place)) for column in columns)
        else:
            ids = tokenizer.encode(text_in(record, self._columns["text"], place))
            source, target = ids[: len(ids) // 2], ids[len(ids) // 2 :]
        target = self._cut([tokenizer.bos_id, *target, tokenizer.eos_id], 1)
        source = [*tokenizer.begin_ids, *source, tokenizer.eos_id]  # as Tokenizer.source_ids of a text
        return {"input_ids": self._cut(source), "decoder_input_ids": target[:-1],
                "labels": target[1:]}  # fmt: skip

    def _cut(self, ids: list[int], more: int = 0) -> list[int]:
        """The beginning that an item may have; more: tokens beyond it, which are labels alone."""
        if self.max_length is None or len(ids) <= self.max_length + more:
            return ids
        self.n_cut += 1
        return ids[: self.max_length + more]

    def _class(self, record: Record, place: str) -> str | None:
        found = self._label("classification", column_of(record, self._columns["label"], place), place)
        return None if found is None else str(found)

    def _values(self, record: Record, place: str) -> Any:
        given = column_of(record, self._columns["label"], place)
        values = given if isinstance(given, list) else [given]
        if self.n_values is None:
            self.n_values = len(values)
        if len(values) != self.n_values and given is not None:
            raise UserError(f"{place}: its {self._columns['label']} has {len(values)} values; those before have "
                            f"{self.n_values}")  # fmt: skip
        values = values if given is not None else [None] * self.n_values
        numbers = [self._label("regression", value, place) for value in values]
        return np.array([math.nan if number is None else float(number) for number in numbers], dtype=np.float32)

    def _label(self, kind: Any, value: Any, place: str) -> float | str | None:
        try:
            return read_label(kind, f"its {self._columns['label']}", value)
        except UserError as error:
            raise UserError(f"{place}: {error}") from None

    def _take_classes(self, found: Sequence[str | None]) -> None:
        places = {name: i for i, name in enumerate(self.classes)}
        for number, (item, name) in enumerate(zip(self._items, found, strict=True), 1):
            if name is not None and name not in places:
                known = ", ".join(self.classes[:10])
                raise UserError(f"{self.path}, record {number}: has the class {name!r}, which is none of {known}")
            item["labels"] = IGNORE if name is None else places[name]


def _places(found: Sequence[str | None]) -> tuple[str, ...]:
    """The classes of a file in the order of their places: integers from 0 where all are, else names in order."""
    names = {name for name in found if name is not None}
    if names and all(name.isdecimal() for name in names):
        return tuple(map(str, range(max(map(int, names)) + 1)))
    return tuple(sorted(names))
