"""How well a model predicts texts: each token once, in windows of its context. Per byte and per word what is counted is
the text as it stands in the data, so that tokenizers can be compared; per token it is the model's own affair."""

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from llm.errors import UserError
from llm.evaluate.requests import Answer, Score, Scored
from llm.evaluate.tasks.asked import Asked, Setting
from llm.evaluate.tasks.base import Document, EvalTask, Measures, Metric, computed
from llm.evaluate.tasks.config import AskingConfig
from llm.evaluate.tasks.metrics import words
from llm.evaluate.tasks.rows import EvalRow, as_json


class PerplexityConfig(AskingConfig):
    """A task of texts."""

    prompt: str = "{{ text }}"
    """template of the text"""
    source: str | None = None
    """template of what a row came from: metrics are also reported for each, as METRIC/SOURCE"""
    stream: bool = False
    """texts of a source (of all, without `source`) are one text, rather than documents that each begin anew"""
    separator: str = "\n\n"
    """between the texts of a stream"""


Sums = NDArray[np.float64]


def _per(sums: Sums) -> Sums:
    with np.errstate(over="ignore"):
        return cast(Sums, np.exp(-sums[..., 0] / sums[..., 1]))


def _bits(sums: Sums) -> Sums:
    return -sums[..., 0] / (math.log(2) * sums[..., 1])


METRICS = {
    "bits_per_byte": Metric(("logprob", "bytes"), _bits),
    "byte_ppl": Metric(("logprob", "bytes"), _per),
    "word_ppl": Metric(("logprob", "words"), _per),
    "ppl": Metric(("logprob", "tokens"), _per),
}


class PerplexityTask(EvalTask):
    """Perplexity per token, word and byte, from sums over all documents."""

    kind = "perplexity"
    schema = PerplexityConfig
    defaults = ("bits_per_byte", "word_ppl", "ppl")

    def settle(self) -> None:
        config = cast(PerplexityConfig, self.config)
        if config.description:
            raise UserError("description: kind perplexity scores texts as they are")
        self._text = self.template(config.prompt, "prompt")
        self._source = None if config.source is None else self.template(config.source, "source")

    def metric(self, name: str) -> Metric | None:
        return METRICS.get(name)

    def possible(self) -> str:
        return ", ".join(METRICS)

    def read(self) -> tuple[list[EvalRow], bool]:
        rows, more = super().read()
        config = cast(PerplexityConfig, self.config)
        if not config.stream:
            return rows, more
        streams: dict[str, list[EvalRow]] = {}
        for row in rows:
            with self._naming(row):
                streams.setdefault(self._source_of(row), []).append(row)
        joined = []
        for number, (source, parts) in enumerate(streams.items(), 1):
            texts = []
            for row in parts:
                with self._naming(row):
                    texts.append(self._text.text(row.columns))
            place = f"{parts[0].place} and {len(parts) - 1:,} more" if len(parts) > 1 else parts[0].place
            columns = {"rows": len(parts), "source": source, "text": config.separator.join(texts)}
            joined.append(EvalRow(number, place, parts[0].file, columns))
        return joined, more

    def document(self, row: EvalRow, asked: Asked, setting: Setting) -> Document:
        stream = cast(PerplexityConfig, self.config).stream
        text = row.columns["text"] if stream else self._text.text(row.columns)
        source = row.columns["source"] if stream else self._source_of(row)
        if not text:
            raise UserError("prompt: the text is empty, so there is nothing to score")
        windows = setting.encoder.windows(text)
        if not windows:
            raise UserError("prompt: the text has no tokens, so there is nothing to score")
        return Document(
            row.number,
            row.place,
            {key: value for key, value in as_json(row.columns).items() if not (stream and key == "text")},
            "",
            tuple(Score(context, target) for context, target in windows),
            (text, *[""] * (len(windows) - 1)),
            extra={
                "bytes": len(text.encode()),
                "words": words(text),
                "tokens": sum(len(target) for _, target in windows),
                "source": source,
            },
        )

    def measure(self, document: Document, answers: Sequence[Answer]) -> Measures:
        scored = [answer for answer in answers if isinstance(answer, Scored)]
        found: Measures = {key: float(document.extra[key]) for key in ("bytes", "words", "tokens")}
        found["logprob"] = math.fsum(answer.logprob for answer in scored)
        return found | {name: computed(name, metric, [found])[0] for name, metric in METRICS.items()}

    def more(self, documents: Sequence[Document], measures: Sequence[Measures]) -> dict[str, Any]:
        """What was counted, and metrics of each source."""
        found: dict[str, Any] = {
            f"n_{key}": int(sum(document.extra[key] for document in documents)) for key in ("tokens", "words", "bytes")
        }
        if self._source is None:
            return found
        sources = dict.fromkeys(document.extra["source"] for document in documents)
        for source in sources:
            of = [m for document, m in zip(documents, measures, strict=True) if document.extra["source"] == source]
            for name in self.metrics:
                found[f"{name}/{source}"], found[f"{name}/{source}_stderr"] = computed(name, METRICS[name], of)
            found[f"n/{source}"] = len(of)
        return found

    def sample(self, document: Document, answers: Sequence[Answer], measures: Measures) -> dict[str, Any]:
        line = super().sample(document, answers, measures)
        scored = [answer for answer in answers if isinstance(answer, Scored)]
        line["responses"] = [
            {
                "text": document.asked[0],
                "logprob": measures["logprob"],
                "greedy": all(answer.greedy for answer in scored),
                "tokens": document.extra["tokens"],
            }
        ]
        return line

    def _source_of(self, row: EvalRow) -> str:
        return "" if self._source is None else self._source.text(row.columns)
