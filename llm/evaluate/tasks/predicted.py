"""Tasks of labels: what a model's prediction head makes of texts, and how near that is to what is known of them.

Shapes: n documents, L labels of one: 1 for a classification, else as many as the model's outputs; C outputs.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from llm.data.labelled import encoded
from llm.data.labels import Prediction, read_label
from llm.errors import UserError
from llm.evaluate.requests import Answer, Predict, Predicted
from llm.evaluate.tasks.asked import Asked, Head, Setting
from llm.evaluate.tasks.base import Document, EvalTask, Measures, Metric
from llm.evaluate.tasks.config import AskingConfig
from llm.evaluate.tasks.rows import EvalRow, as_json
from llm.evaluate.tasks.template import Template, kind_of
from llm.prediction_scores import SCORES, of_one_value

Floats = NDArray[np.float64]
METRICS: dict[Prediction, tuple[str, ...]] = {
    "classification": ("accuracy", "macro_f1", "roc_auc", "average_precision"),
    "regression": ("rmse", "mae", "r2"),
    "multilabel": ("roc_auc", "average_precision", "accuracy", "macro_f1"),
}
"""Of a kind of labels; those that are reported where a task names none."""
EVERY = tuple(dict.fromkeys(name for names in METRICS.values() for name in names))


class PredictionConfig(AskingConfig):
    """A task of labels."""

    prompt: str = "{{ text }}"
    """template of the text"""
    gold: str | tuple[str, ...] = "{{ label }}"
    """template of the label, or of the list of labels; or a list of templates, one a label"""


class PredictionTask(EvalTask):
    """Metrics of all documents' predictions, those without a label left out."""

    kind = "prediction"
    schema = PredictionConfig
    defaults = ()
    of_whole_texts = True

    def settle(self) -> None:
        config = cast(PredictionConfig, self.config)
        if config.description:
            raise UserError("description: kind prediction reads texts as they are")
        self._text = self.template(config.prompt, "prompt")
        gold = config.gold
        self._gold = (
            self.template(gold, "gold")
            if isinstance(gold, str)
            else [self.template(one, f"gold.{i}") for i, one in enumerate(gold)]
        )
        self._head: Head | None = None

    def metric(self, name: str) -> Metric | None:
        if name not in EVERY:
            return None
        head = self._head
        if head is None:
            return Metric()
        labels = [f"label.{i}" for i in range(1 if head.kind == "classification" else head.n)]
        score = SCORES[head.kind][name]

        def of_rows(table: Floats) -> float | None:
            return score(table[:, : len(labels)], table[:, len(labels) :])

        return Metric((*labels, *(f"output.{i}" for i in range(head.n))), of_rows=of_rows)

    def possible(self) -> str:
        return ", ".join(f"{', '.join(names)} ({kind})" for kind, names in METRICS.items())

    def meet(self, head: Head | None) -> None:
        """Settle what depends on the model. UserError where it predicts nothing, or other things than the metrics are
        of.
        """
        if head is None:
            raise UserError(f"{self.file}: kind=prediction: the model has no prediction head (model.n_prediction)")
        for name in self.metrics:
            if name not in METRICS[head.kind]:
                possible = ", ".join(METRICS[head.kind])
                raise UserError(f"{self.file}: metrics: {name} is none of a {head.kind}; possible are {possible}")
        self._head = head
        self.metrics = self.metrics or METRICS[head.kind]

    def document(self, row: EvalRow, asked: Asked, setting: Setting) -> Document:
        if setting.chat is not None:
            raise UserError("kind prediction reads texts as they are, without a chat template")
        assert self._head is not None
        text = self._text.text(row.columns)
        if not text:
            raise UserError("prompt: the text is empty, so there is nothing to predict")
        ids = encoded(setting.encoder.tokenizer, text).tolist()
        room = setting.encoder.context_length
        labels = self._labels(row, self._head)
        return Document(
            row.number,
            row.place,
            as_json(row.columns),
            text,
            (Predict(tuple(ids[:room])),),
            (text,),
            gold=labels[0] if len(labels) == 1 else labels,
            counts={"truncated": int(len(ids) > room), "unlabelled": int(all(label is None for label in labels))},
            extra={"numbers": [self._number(label, self._head) for label in labels]},
        )

    def measure(self, document: Document, answers: Sequence[Answer]) -> Measures:
        (answer,) = answers
        assert isinstance(answer, Predicted) and self._head is not None
        numbers = document.extra["numbers"]
        found: Measures = {f"label.{i}": number for i, number in enumerate(numbers)}
        found |= {f"output.{i}": value for i, value in enumerate(answer.predictions)}
        if self._head.kind == "classification" and numbers[0] is not None:
            found["accuracy"] = float(np.argmax(answer.predictions) == numbers[0])
        if self._head.kind == "regression":
            errors = [abs(p - x) for p, x in zip(answer.predictions, numbers, strict=True) if x is not None]
            found["mae"] = float(np.mean(errors)) if errors else None
        return found

    def more(self, documents: Sequence[Document], measures: Sequence[Measures]) -> dict[str, Any]:
        """How many labels there are; of several, each one's metrics as METRIC/LABEL, and how many of them have one
        value only, of which nothing can be ranked."""
        head = self._head
        assert head is not None
        numbers = np.array([document.extra["numbers"] for document in documents], dtype=np.float64)
        found: dict[str, Any] = {"n_labels": int(np.count_nonzero(~np.isnan(numbers)))}
        if numbers.shape[1] == 1:
            return found
        outputs = np.array([[m[f"output.{i}"] for i in range(head.n)] for m in measures], dtype=np.float64)
        for i, name in enumerate(head.names or ()):
            for metric in self.metrics:
                value = SCORES[head.kind][metric](numbers[:, i : i + 1], outputs[:, i : i + 1])
                found[f"{metric}/{name}"] = value
        return found | ({"labels_of_one_value": of_one_value(numbers)} if head.kind == "multilabel" else {})

    def sample(self, document: Document, answers: Sequence[Answer], measures: Measures) -> dict[str, Any]:
        (answer,), (request,) = answers, document.requests
        assert isinstance(answer, Predicted) and isinstance(request, Predict) and self._head is not None
        names = self._head.names or ()
        said = dict(zip(names, answer.predictions, strict=True))
        line: dict[str, Any] = {
            "number": document.number,
            "doc": document.doc,
            "prompt": document.prompt,
            "responses": [
                {"text": _shown(said, self._head), "logprob": None, "greedy": None, "tokens": len(request.tokens)}
            ],
            "predictions": said,
            "gold": as_json(document.gold),
            "metrics": {name: as_json(measures[name]) for name in self.metrics if name in measures},
        }
        return line | {name: True for name, count in document.counts.items() if count}

    def _labels(self, row: EvalRow, head: Head) -> list[float | str | None]:
        n = 1 if head.kind == "classification" else head.n
        values: Any
        if isinstance(self._gold, Template):
            value = self._gold.value(row.columns)
            values = [value] * n if value is None or (n == 1 and not isinstance(value, list | tuple)) else value
        else:
            values = [template.value(row.columns) for template in self._gold]
        if isinstance(values, str) or not isinstance(values, list | tuple):
            raise UserError(f"gold is {kind_of(values)}, where a list of {n} labels must be")
        if len(values) != n:
            raise UserError(f"gold has {len(values)} labels, and the model predicts {n}")
        keys = ["gold"] if n == 1 else [f"gold.{i}" for i in range(n)]
        return [read_label(head.kind, key, value) for key, value in zip(keys, values, strict=True)]

    def _number(self, label: float | str | None, head: Head) -> float | None:
        """A label as a number: the place of a class. UserError where the model does not know the class."""
        if not isinstance(label, str) or head.names is None:
            return None if isinstance(label, str) else label
        if label not in head.names:
            known = ", ".join(map(repr, head.names[:10])) + (", ..." if len(head.names) > 10 else "")
            raise UserError(f"gold is the class {label!r}, and the model knows {known}")
        return float(head.names.index(label))


def _shown(said: Mapping[str, float], head: Head) -> str:
    """A prediction for people: the likeliest class with its probability, or each label's number."""
    if head.kind == "classification":
        best = max(said, key=lambda name: said[name])
        return f"{best} ({said[best]:.3f})"
    return ", ".join(f"{name} {value:.4g}" for name, value in said.items())
