"""Pages for those who come from elsewhere: our keys on them exist, and so do theirs where we can look."""

import dataclasses
import re

import pytest

from llm.args import ModelArgs
from llm.train.config import RunConfig
from llm.train.config.explain import keys_of
from tests.docs.pages import PAGES, text_of

FROM = [page for page in PAGES if page.startswith("docs/from/") and not page.endswith("README.md")]
OURS = {*keys_of(RunConfig), *RunConfig.model_fields, *(f"model.{key}" for key in ModelArgs.model_fields)}
FLAGS = ("--run_dir", "--nproc")


def rows(page: str) -> list[list[str]]:
    """The cells of the rows of tables that map their keys to ours."""
    tables = re.findall(r"^\|[^\n]*\| here \|[^\n]*\n\|[-|]*\n((?:\|.*\n)*)", text_of(page), flags=re.M)
    return [[cell.strip() for cell in line.strip("|").split(" |")] for table in tables for line in table.splitlines()]


@pytest.mark.parametrize("page", FROM)
def test_our_keys_exist(page: str) -> None:
    assert len(rows(page)) >= 25
    for _, ours, *_ in rows(page):
        for key in re.findall(r"`([^`]+)`", ours):
            assert key.split(":")[0].split("=")[0] in OURS or key in FLAGS, key


def test_keys_of_training_arguments_exist() -> None:
    transformers = pytest.importorskip("transformers")
    fields = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    theirs = {key for row in rows("docs/from/hf_trainer.md") for key in re.findall(r"`([^`]+)`", row[0])}
    assert theirs - fields == set()
