"""The page on tasks names every key and every metric that there is."""

import re
from typing import get_args

import pytest

from llm.evaluate.tasks import KINDS
from llm.evaluate.tasks.config import Data, Fewshot
from llm.evaluate.tasks.extract import Rule
from tests.shared import ROOT

PAGE = (ROOT / "docs/evaluation_tasks.md").read_text()
MARKED = " ".join(f"{example} {word}" for example, word in re.findall(r"```yaml(.*?)```|`([^`]+)`", PAGE, re.S))
WORDS = set(re.findall(r"[A-Za-z_@]+", MARKED))


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_of_a_kind_and_every_metric_stands_on_the_page(kind: str) -> None:
    task = KINDS[kind]
    assert kind in PAGE
    assert set(task.schema.model_fields) <= WORDS
    assert set(task.defaults) <= WORDS
    assert set(re.findall(r"[A-Za-z_@]+", task.possible(task))) <= WORDS  # type: ignore[arg-type]


@pytest.mark.parametrize("section", [Data, Fewshot, Rule])
def test_every_key_of_a_section_stands_on_the_page(section: type) -> None:
    assert set(section.model_fields) <= WORDS  # type: ignore[attr-defined]
    for field in section.model_fields.values():  # type: ignore[attr-defined]
        assert {value for value in get_args(field.annotation) if isinstance(value, str)} <= WORDS
