"""Tasks of choices: the likeliest answer to a prompt, or the prompt after which a target is likeliest (Winogrande's
partial scoring)."""

from collections.abc import Sequence
from typing import Any, cast

from pydantic import model_validator

from llm.errors import UserError
from llm.evaluate.requests import Answer, Score, Scored
from llm.evaluate.tasks.asked import Asked, Example, Setting
from llm.evaluate.tasks.base import Document, EvalTask, Measures, Metric
from llm.evaluate.tasks.config import FewshotConfig
from llm.evaluate.tasks.metrics import highest, normalised
from llm.evaluate.tasks.rows import EvalRow, as_json
from llm.evaluate.tasks.template import Template, as_text, kind_of

METRICS = ("acc", "acc_norm", "acc_bytes")
Texts = str | tuple[str, ...]
"""A template of a list, or a list of templates."""


class ChoiceConfig(FewshotConfig):
    """A task of choices."""

    choices: Texts | None = None
    """what may follow the prompt"""
    prompts: Texts | None = None
    """what the target may follow, in place of prompt and choices"""
    target: str | None = None
    """template of what follows each of the prompts"""
    gold: str
    """template of the right one: its place from 0, or its text"""

    @model_validator(mode="after")
    def _one_way(self) -> "ChoiceConfig":
        given = {key for key in ("prompt", "choices", "prompts", "target") if getattr(self, key) is not None}
        if given not in ({"prompt", "choices"}, {"prompts", "target"}):
            names = ", ".join(sorted(given)) or "none of them"
            raise ValueError(f"either prompt and choices are needed, or prompts and target; it has {names}")
        return self


class ChoiceTask(EvalTask):
    """Which of several is the likeliest."""

    kind = "multiple_choice"
    schema = ChoiceConfig
    defaults = ("acc", "acc_norm")

    def settle(self) -> None:
        config = cast(ChoiceConfig, self.config)
        self._prompt = None if config.prompt is None else self.template(config.prompt, "prompt")
        self._target = None if config.target is None else self.template(config.target, "target")
        self._key = "choices" if config.prompts is None else "prompts"
        several = config.choices if config.prompts is None else config.prompts
        assert several is not None
        self._several = (
            self.template(several, self._key)
            if isinstance(several, str)
            else [self.template(one, f"{self._key}.{i}") for i, one in enumerate(several)]
        )
        self._gold = self.template(config.gold, "gold")

    def metric(self, name: str) -> Metric | None:
        return Metric() if name in METRICS else None

    def possible(self) -> str:
        return ", ".join(METRICS)

    def document(self, row: EvalRow, asked: Asked, setting: Setting) -> Document:
        several, gold = self._texts(row)
        if self._prompt is not None:
            prompt = self._prompt.text(row.columns)
            ways = [(prompt, choice) for choice in several]
            shown = asked.text(prompt)
        else:
            assert self._target is not None
            target = self._target.text(row.columns)
            ways = [(prompt, target) for prompt in several]
            shown = asked.text(several[gold])
        pairs = []
        for i, (before, after) in enumerate(ways):
            try:
                pairs.append(asked.pair(before, after))
            except UserError as error:
                raise UserError(f"{self._key[:-1]} {i} (from 0): {error}") from None
        answers = tuple(after for _, after in ways)
        return Document(
            row.number,
            row.place,
            as_json(row.columns),
            shown,
            tuple(Score(pair.context, pair.target) for pair in pairs),
            answers if self._prompt is not None else tuple(several),
            gold=gold,
            counts={
                "truncated": int(any(pair.truncated for pair in pairs)),
                "joint": int(any(pair.joint for pair in pairs)),
            },
            extra={"lengths": [len(text) for text in answers], "bytes": [len(text.encode()) for text in answers]},
        )

    def measure(self, document: Document, answers: Sequence[Answer]) -> Measures:
        found: Measures = {}
        for name, scores in self._scores(document, answers).items():
            best, tied = highest(scores)
            found[name] = float(best == document.gold)
            found[f"{name}_tied"] = float(tied)
        return found

    def more(self, documents: Sequence[Document], measures: Sequence[Measures]) -> dict[str, Any]:
        """ties: documents in which several choices are the best, of which the first counts."""
        return {"ties": sum(any(found[f"{name}_tied"] for name in self.metrics) for found in measures)}

    def example(self, row: EvalRow) -> Example:
        several, gold = self._texts(row)
        if self._prompt is not None:
            return Example(self._prompt.text(row.columns), several[gold])
        assert self._target is not None
        return Example(several[gold], self._target.text(row.columns))

    def _scores(self, document: Document, answers: Sequence[Answer]) -> dict[str, list[float]]:
        logprobs = [answer.logprob for answer in answers if isinstance(answer, Scored)]
        return {
            "acc": logprobs,
            "acc_norm": normalised(logprobs, document.extra["lengths"]),
            "acc_bytes": normalised(logprobs, document.extra["bytes"]),
        }

    def _texts(self, row: EvalRow) -> tuple[list[str], int]:
        """The choices, or prompts, and the place of the right one."""
        if isinstance(self._several, Template):
            value = self._several.value(row.columns)
            if not isinstance(value, list | tuple):
                raise UserError(f"{self._key} is {kind_of(value)}, not a list")
        else:
            value = [template.text(row.columns) for template in self._several]
        texts = [as_text(item, f"{self._key}.{i}") for i, item in enumerate(value)]
        if not texts:
            raise UserError(f"has no {self._key}")
        return texts, self._place(self._gold.value(row.columns), texts)

    def _place(self, gold: Any, texts: list[str]) -> int:
        if isinstance(gold, str):
            if gold in texts:
                return texts.index(gold)
            if not gold.strip().lstrip("-").isdecimal():
                raise UserError(f"gold={gold!r} is none of its {self._key}")
            gold = int(gold)
        if isinstance(gold, float) and gold.is_integer():
            gold = int(gold)
        if not isinstance(gold, int) or isinstance(gold, bool):
            raise UserError(f"gold is {kind_of(gold)}, not the place of one of its {self._key}, or its text")
        if not 0 <= gold < len(texts):
            raise UserError(f"gold={gold} is out of range: it has {len(texts)} {self._key}, counted from 0")
        return gold
