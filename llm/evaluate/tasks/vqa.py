"""Questions about images. An image that is missing or damaged is an error before anything is asked: none is answered
blind."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from llm.data.json_rows import called
from llm.errors import UserError
from llm.evaluate.requests import Answer, Continue
from llm.evaluate.tasks.asked import Asked, Setting
from llm.evaluate.tasks.base import Document, EvalTask, Measures, Metric
from llm.evaluate.tasks.config import AskingConfig
from llm.evaluate.tasks.extract import Extract, Rule
from llm.evaluate.tasks.metrics import vqa_accuracy, vqa_plain, yes_or_no
from llm.evaluate.tasks.rows import EvalRow, as_json
from llm.evaluate.tasks.template import as_text


class VQAConfig(AskingConfig):
    """A task of questions about images."""

    prompt: str
    """template of the question; `<image>` in it is where an image stands, else they stand before it"""
    images: str = "{{ images }}"
    """template of a path, of bytes, or of a list of them; paths are relative to --image_root, else to the data's folder
    """
    gold: str
    """template of the right answer, or of the list of answers that people gave"""
    extract: str | Rule | tuple[str | Rule, ...] | None = None
    """regular expression of the answer in what is written; of a list the first that matches"""
    stop: tuple[str, ...] = ()
    max_new_tokens: int = Field(default=16, ge=1)


def f1_of(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """2 tp / (2 tp + fp + fn), of (tp, fp, fn)."""
    tp, fp, fn = sums[..., 0], sums[..., 1], sums[..., 2]
    with np.errstate(all="ignore"):
        return 2 * tp / (2 * tp + fp + fn)


METRICS = {
    "vqa_acc": Metric(),
    "exact": Metric(),
    "yes_no_f1": Metric(("tp", "fp", "fn"), f1_of),
}


class VQATask(EvalTask):
    """vqa_acc: min(people who gave the answer / 3, 1); exact: any of the answers; yes_no_f1: of yes, over the questions
    whose right answer is yes or no."""

    kind = "vqa"
    schema = VQAConfig
    defaults = ("exact",)

    def settle(self) -> None:
        config = cast(VQAConfig, self.config)
        self._prompt, self._gold = self.template(config.prompt, "prompt"), self.template(config.gold, "gold")
        self._images = self.template(config.images, "images")
        self._extract = None if config.extract is None else Extract(config.extract)
        if any(not stop for stop in config.stop):
            raise UserError("stop: an empty text ends every answer")

    def metric(self, name: str) -> Metric | None:
        return METRICS.get(name)

    def possible(self) -> str:
        return ", ".join(METRICS)

    def document(self, row: EvalRow, asked: Asked, setting: Setting) -> Document:
        config = cast(VQAConfig, self.config)
        if setting.pictures is None:
            raise UserError("kind vqa is for a model with vision; this one reads text only (model.vision)")
        prompt, sources = self._prompt.text(row.columns), self._sources(row)
        pictures = setting.pictures.under(self._root(), sources)
        ids = asked.with_pictures(prompt, pictures, config.max_new_tokens)
        return Document(
            row.number,
            row.place,
            as_json(row.columns),
            prompt,
            (Continue(ids, config.max_new_tokens, config.stop, pictures=tuple(pictures)),),
            ("",),
            gold=self._answers(row),
            extra={"images": [as_json(source) for source in sources], "tokens": len(ids)},
        )

    def measure(self, document: Document, answers: Sequence[Answer]) -> Measures:
        said = self._said(answers[0])
        gold: list[str] = document.gold
        found: Measures = {
            "vqa_acc": 0.0 if said is None else vqa_accuracy(said, gold),
            "exact": float(said is not None and vqa_plain(said) in [vqa_plain(other) for other in gold]),
            "not_extracted": float(said is None),
        }
        meant = yes_or_no(gold[0])
        heard = None if said is None else yes_or_no(said)
        of_them = meant is not None
        return found | {
            "yes_no_f1": float(heard == meant) if of_them else None,
            "tp": float(of_them and meant is True and heard is True),
            "fp": float(of_them and meant is False and heard is True),
            "fn": float(of_them and meant is True and heard is not True),
            "yes_no": float(of_them),
            "neither": float(of_them and heard is None),
        }

    def more(self, documents: Sequence[Document], measures: Sequence[Measures]) -> dict[str, Any]:
        """prompt_tokens: with those of images, on average; n_yes_no: questions of yes and no, neither: answered by
        neither; not_extracted: answers in which no pattern was found."""
        total = {key: int(sum(found[key] or 0 for found in measures)) for key in ("yes_no", "neither", "not_extracted")}
        counted: dict[str, Any] = {"prompt_tokens": sum(d.extra["tokens"] for d in documents) / len(documents)}
        if "yes_no_f1" in self.metrics:
            counted |= {"n_yes_no": total["yes_no"], "neither": total["neither"]}
        return counted | ({} if self._extract is None else {"not_extracted": total["not_extracted"]})

    def sample(self, document: Document, answers: Sequence[Answer], measures: Measures) -> dict[str, Any]:
        line = super().sample(document, answers, measures) | {"images": document.extra["images"]}
        if self._extract is not None:
            line["responses"][0]["extracted"] = self._said(answers[0])
        return line

    def _said(self, answer: Answer) -> str | None:
        text = getattr(answer, "text", "")
        return text.strip() if self._extract is None else self._extract(text)[0]

    def _root(self) -> Path:
        return self.options.image_root or self.rows.files[0].path.parent

    def _sources(self, row: EvalRow) -> list[str | bytes]:
        value = self._images.value(row.columns)
        listed = list(value) if isinstance(value, list | tuple) else [value]
        found: list[str | bytes] = []
        for item in listed:
            inner = item.get("bytes") or item.get("path") if isinstance(item, dict) else item
            if not isinstance(inner, str | bytes) or not inner:
                raise UserError(f"images: {called(item)} where a path or an image's bytes must be")
            found.append(inner)
        if not found:
            raise UserError("images: has none, and no question is asked blind")
        return found

    def _answers(self, row: EvalRow) -> list[str]:
        value = self._gold.value(row.columns)
        listed = list(value) if isinstance(value, list | tuple) else [value]
        if not listed:
            raise UserError("gold has no answers")
        named = [item.get("answer") if isinstance(item, dict) else item for item in listed]
        return [as_text(item, f"gold.{i}" if len(named) > 1 else "gold") for i, item in enumerate(named)]
