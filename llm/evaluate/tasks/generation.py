"""Tasks of written answers: compared with references as they are, by their words or as numbers; of one answer or of
several that are drawn."""

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from pydantic import Field

from llm.data.json_rows import called
from llm.errors import UserError
from llm.evaluate.requests import Answer, Continue, Continued
from llm.evaluate.tasks.asked import Asked, Example, Setting
from llm.evaluate.tasks.base import Document, EvalTask, Measures, Metric
from llm.evaluate.tasks.config import FewshotConfig
from llm.evaluate.tasks.extract import Extract, Rule
from llm.evaluate.tasks.metrics import f1, most_frequent, number, pass_at, same_number
from llm.evaluate.tasks.rows import EvalRow, as_json
from llm.evaluate.tasks.template import as_text
from llm.generation.beams import Beams
from llm.generation.sampling import Sampling

OF_ONE = ("exact_match", "f1", "number")
OF_SEVERAL = re.compile(r"(pass|maj)@([1-9][0-9]*)")
PUNCTUATION = str.maketrans("", "", string.punctuation)


class GenerationConfig(FewshotConfig):
    """A task of written answers."""

    prompt: str
    gold: str
    """template of the right answer, or of a list of right ones; where `extract` finds something in it, that"""
    extract: str | Rule | tuple[str | Rule, ...] | None = None
    """regular expression of the answer in what is written; of a list the first that matches"""
    stop: tuple[str, ...] = ()
    """texts before which an answer ends"""
    max_new_tokens: int = Field(default=128, ge=1)
    samples: int = Field(default=1, ge=1, le=10_000)
    """answers to each prompt"""
    temperature: float = Field(default=0.0, ge=0)
    top_k: int | None = Field(default=None, ge=1)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int = Field(default=0, ge=0, lt=2**63)
    num_beams: int = Field(default=1, ge=1, exclude_if=lambda value: value == 1)
    """continuations that a beam search runs side by side, whose best is the answer"""
    length_penalty: float = Field(default=1.0, exclude_if=lambda value: value == 1)
    """of beam search"""
    early_stopping: bool = Field(default=False, exclude_if=lambda value: value is False)
    """of beam search"""
    ignore_case: bool = False
    """exact_match: large and small letters are the same"""
    ignore_punctuation: bool = False
    """exact_match: without ASCII punctuation"""
    ignore: tuple[str, ...] = ()
    """exact_match: regular expressions of what is taken out of answer and reference, in this order, before the other
    two"""
    correct: str = "exact_match"
    """what makes an answer correct for pass@k, and alike for maj@k: exact_match or number"""


@dataclass(frozen=True)
class Said:
    """What was answered."""

    answers: list[str | None]
    """None: nothing was found in it"""
    rules: list[int]
    """of `extract`, which found it, from 1"""


class GenerationTask(EvalTask):
    """What a model writes, against references."""

    kind = "generate"
    schema = GenerationConfig
    defaults = ("exact_match",)

    def settle(self) -> None:
        config = cast(GenerationConfig, self.config)
        self._prompt, self._gold = self.template(config.prompt, "prompt"), self.template(config.gold, "gold")
        self._extract = None if config.extract is None else Extract(config.extract)
        if any(not stop for stop in config.stop):
            raise UserError("stop: an empty text ends every answer")
        try:
            self.sampling = Sampling(config.temperature, config.top_k, config.top_p, seed=config.seed)
            self.beams = Beams(config.num_beams, config.length_penalty, config.early_stopping)
            self.beams.check(self.sampling)
            self._ignored = [re.compile(pattern) for pattern in config.ignore]
        except ValueError as error:
            raise UserError(str(error)) from None
        except re.error as error:
            raise UserError(f"ignore: not a regular expression ({error})") from None
        if config.samples > 1 and config.num_beams > 1:
            raise UserError(f"samples={config.samples}: a search (num_beams={config.num_beams}) gives one answer")
        if config.samples > 1 and config.temperature == 0:
            raise UserError(f"samples={config.samples}: at temperature 0 all are the same; set a temperature")
        if config.correct not in ("exact_match", "number"):
            raise UserError(f"correct={config.correct}: possible are exact_match, number")

    def metric(self, name: str) -> Metric | None:
        several = OF_SEVERAL.fullmatch(name)
        if several is None:
            return Metric() if name in OF_ONE else None
        k, samples = int(several[2]), cast(GenerationConfig, self.config).samples
        if k > samples:
            raise UserError(f"metrics: {name} needs at least {k} samples; samples={samples}")
        return Metric()

    def possible(self) -> str:
        return ", ".join([*OF_ONE, "pass@K", "maj@K"])

    def document(self, row: EvalRow, asked: Asked, setting: Setting) -> Document:
        config = cast(GenerationConfig, self.config)
        prompt = self._prompt.text(row.columns)
        ids, source, truncated = asked.begun(prompt, config.max_new_tokens)
        return Document(
            row.number,
            row.place,
            as_json(row.columns),
            asked.text(prompt),
            tuple(
                Continue(ids, config.max_new_tokens, config.stop, self.sampling, sample, (), self.beams, source)
                for sample in range(config.samples)
            ),
            ("",) * config.samples,
            gold=self._references(row),
            counts={"truncated": int(truncated)},
        )

    def measure(self, document: Document, answers: Sequence[Answer]) -> Measures:
        said, gold = self.said(answers), self._found_in(document.gold)
        found: Measures = {
            "exact_match": _mean([self._exact(answer, gold) for answer in said.answers]),
            "f1": _mean([max(f1(answer, other) for other in gold) if answer else 0.0 for answer in said.answers]),
            "number": _mean([self._number(answer, gold) for answer in said.answers]),
            "not_extracted": float(sum(answer is None for answer in said.answers)),
            "by_fallback": float(sum(rule > 1 for rule in said.rules)),
        }
        right = self._exact if cast(GenerationConfig, self.config).correct == "exact_match" else self._number
        for name in self.metrics:
            if several := OF_SEVERAL.fullmatch(name):
                k = int(several[2])
                if several[1] == "pass":
                    correct = sum(right(answer, gold) for answer in said.answers)
                    found[name] = pass_at(len(answers), int(correct), k)
                else:
                    found[name] = self._majority(said.answers[:k], gold)
        return found

    def more(self, documents: Sequence[Document], measures: Sequence[Measures]) -> dict[str, Any]:
        """not_extracted: answers in which no pattern was found; by_fallback: those that a later pattern found."""
        if self._extract is None:
            return {}
        return {key: int(sum(found[key] or 0 for found in measures)) for key in ("not_extracted", "by_fallback")}

    def sample(self, document: Document, answers: Sequence[Answer], measures: Measures) -> dict[str, Any]:
        line = super().sample(document, answers, measures)
        if self._extract is not None:
            said = self.said(answers)
            for response, answer, rule in zip(line["responses"], said.answers, said.rules, strict=True):
                response |= {"extracted": answer, "extracted_by": rule}
        return line

    def example(self, row: EvalRow) -> Example:
        return Example(self._prompt.text(row.columns), self._references(row)[0])

    def said(self, answers: Sequence[Answer]) -> Said:
        """What of the texts is their answer."""
        texts = [answer.text for answer in answers if isinstance(answer, Continued)]
        if self._extract is None:
            return Said([text.strip() for text in texts], [0] * len(texts))
        found = [self._extract(text) for text in texts]
        return Said([answer for answer, _ in found], [rule for _, rule in found])

    def _references(self, row: EvalRow) -> list[str]:
        value = self._gold.value(row.columns)
        if not isinstance(value, list | tuple):
            return [as_text(value, "gold")]
        if not value:
            raise UserError("gold has no answers")
        if any(isinstance(item, list | dict) for item in value):
            raise UserError(f"gold holds {called(value[0])}, not texts")
        return [as_text(item, f"gold.{i}") for i, item in enumerate(value)]

    def _found_in(self, references: Sequence[str]) -> list[str]:
        """The references, or what of them is the answer."""
        if self._extract is None:
            return list(references)
        return [self._extract(text)[0] or text for text in references]

    def _plain(self, text: str) -> str:
        config = cast(GenerationConfig, self.config)
        for pattern in self._ignored:
            text = pattern.sub("", text)
        if config.ignore_case:
            text = text.lower()
        if config.ignore_punctuation:
            text = text.translate(PUNCTUATION)
        return text.strip()

    def _exact(self, answer: str | None, gold: Sequence[str]) -> float:
        return float(answer is not None and self._plain(answer) in [self._plain(other) for other in gold])

    @staticmethod
    def _number(answer: str | None, gold: Sequence[str]) -> float:
        return float(answer is not None and any(same_number(answer, other) for other in gold))

    def _majority(self, answers: Sequence[str | None], gold: Sequence[str]) -> float:
        """Whether the answer that was given most often is right; numbers are alike by value."""
        if cast(GenerationConfig, self.config).correct == "number":
            value = most_frequent([None if answer is None else number(answer) for answer in answers])
            return float(value is not None and self._number(repr(value), gold))
        chosen = most_frequent([None if answer is None else self._plain(answer) for answer in answers])
        return float(chosen is not None and chosen in [self._plain(other) for other in gold])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
