"""Of a test, run as an extension: samples of a few letters, several in a row, and labels that follow from them. Tasks
`letters_classification`, `letters_regression`, `letters_multilabel`; models for them have 3 outputs.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from llm.batch import IGNORE
from llm.data.heldout import HeldOut
from llm.data.mixture import Mixture
from llm.data.rows import Origin, Row, RowTargets, TokenOrigin
from llm.parallel.launch.world import World
from llm.tasks import OpenedRows, RowsWanted, register
from llm.tasks.prediction import PredictionTask
from llm.tokenizer import Tokenizer

OUTPUTS = 3
MISSING = 0.2
"""Share of labels."""


class Letters:
    """Rows that are a function of their number."""

    targets = ("prediction",)

    def __init__(self, kind: str, n_rows: int, seq_len: int, first: int = 0) -> None:
        self.kind, self.n_rows, self.seq_len, self.first = kind, n_rows, seq_len, first
        self.fingerprint = f"letters {kind} {n_rows} {first}"
        self.values = tuple(f"prediction.{k}" for k in range(1 if kind == "classification" else OUTPUTS))

    def read(self, k: int, epoch: int) -> Row:
        draw = np.random.default_rng([self.first + k, 5])
        lengths: list[int] = []
        while sum(lengths) < self.seq_len - 16:
            lengths.append(int(draw.integers(3, 14)))
        starts = np.cumsum([0, *lengths[:-1]])
        tokens = draw.integers(97, 97 + OUTPUTS, sum(lengths))
        labels, weights = np.full(len(tokens), IGNORE), np.ones(len(tokens), dtype=np.float32)
        numbers = np.zeros((len(self.values), len(tokens)), dtype=np.float32)
        for start, length in zip(starts, lengths, strict=True):
            of_each = np.bincount(tokens[start : start + length] - 97, minlength=OUTPUTS)
            known = {
                "classification": [of_each.argmax()], "regression": of_each * 2.0 + 1, "multilabel": of_each > 2
            }[self.kind]  # fmt: skip
            labels[start], weights[start] = 0, draw.integers(1, 4) / 2
            numbers[:, start] = np.where(draw.random(len(known)) < MISSING, np.nan, known)
        values = dict(zip(self.values, numbers, strict=True))
        return Row(tokens, {"prediction": RowTargets(labels, weights)}, starts.astype(np.int64), values)

    def origin(self, k: int, epoch: int, position: int) -> TokenOrigin:
        return TokenOrigin(Origin("letters", k + 1), k, position, self.seq_len)

    def described(self) -> str:
        return f"(letters) has {self.n_rows} rows"


class OfLetters(PredictionTask):
    def __init__(self, kind: str) -> None:
        self.name, self.kind = f"letters_{kind}", kind

    def open_rows(self, wanted: RowsWanted, tokenizer: Tokenizer, world: World) -> OpenedRows:
        train = Letters(self.kind, 100, wanted.seq_len)
        held_out = Letters(self.kind, 13, wanted.seq_len, first=1000)
        mixture = Mixture([("letters", train, 1.0)], wanted.seq_len, wanted.seed, tokenizer.eos_id)
        return OpenedRows(mixture, HeldOut([held_out], wanted.seq_len, wanted.held_out_rows, tokenizer.eos_id), [])


def model(kind: str, **keys: Any) -> Mapping[str, Any]:
    """Keys of a head for one of the tasks."""
    scaling = {"prediction_mean": [5.0, 4.0, 3.0], "prediction_std": [2.0, 3.0, 4.0]} if kind == "regression" else {}
    return {"n_prediction": OUTPUTS, "prediction": kind, **scaling, **keys}


if __name__ != "tests.distributed.letters":  # by a test that needs its names
    for each in ("classification", "regression", "multilabel"):
        register(OfLetters(each))
