"""Tasks of one right continuation (LAMBADA): whether it is what the model would write, and how likely it is."""

import math
from collections.abc import Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from llm.evaluate.requests import Answer, Score, Scored
from llm.evaluate.tasks.asked import Asked, Example, Setting
from llm.evaluate.tasks.base import Document, EvalTask, Measures, Metric
from llm.evaluate.tasks.config import FewshotConfig
from llm.evaluate.tasks.rows import EvalRow, as_json


class LoglikelihoodConfig(FewshotConfig):
    """A task of one continuation."""

    prompt: str = ""
    target: str
    """template of what is to follow the prompt"""


def perplexity(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """exp(-mean log-probability) of targets, each counted once whatever its length; of (log-probability, 1)."""
    with np.errstate(over="ignore"):
        return cast(NDArray[np.float64], np.exp(-sums[..., 0] / sums[..., 1]))


METRICS = {"acc": Metric(), "perplexity": Metric(("logprob", "one"), perplexity)}


class LoglikelihoodTask(EvalTask):
    """acc: whether each token of the target is the likeliest; perplexity: of whole targets."""

    kind = "loglikelihood"
    schema = LoglikelihoodConfig
    defaults = ("acc", "perplexity")

    def settle(self) -> None:
        config = cast(LoglikelihoodConfig, self.config)
        self._prompt, self._target = self.template(config.prompt, "prompt"), self.template(config.target, "target")

    def metric(self, name: str) -> Metric | None:
        return METRICS.get(name)

    def possible(self) -> str:
        return ", ".join(METRICS)

    def document(self, row: EvalRow, asked: Asked, setting: Setting) -> Document:
        prompt, target = self._prompt.text(row.columns), self._target.text(row.columns)
        pair = asked.pair(prompt, target)
        return Document(
            row.number,
            row.place,
            as_json(row.columns),
            asked.text(prompt),
            (Score(pair.context, pair.target),),
            (target,),
            gold=target,
            counts={"truncated": int(pair.truncated), "joint": int(pair.joint)},
        )

    def measure(self, document: Document, answers: Sequence[Answer]) -> Measures:
        (answer,) = answers
        assert isinstance(answer, Scored)
        alone = math.exp(-answer.logprob) if -answer.logprob < 700 else None
        return {"acc": float(answer.greedy), "perplexity": alone, "logprob": answer.logprob, "one": 1.0}

    def example(self, row: EvalRow) -> Example:
        return Example(self._prompt.text(row.columns), self._target.text(row.columns))
