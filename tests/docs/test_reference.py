"""docs/reference.md has every key, each with a line, and says what the schema says."""

import inspect
import re

import pytest
from pydantic import Field

from llm.jobs.evaluate import LAYOUT_FLAGS, read_flags
from llm.train.config import RunConfig
from llm.train.config.explain import keys_of
from llm.train.config.flags import OWN_FLAGS
from llm.train.config.section import Section
from tests.docs.pages import text_of
from tools.reference import ELSEWHERE, page, rows_of

PAGE = text_of("docs/reference.md")


def test_the_page_is_what_the_schema_makes_of_it() -> None:
    assert page() == PAGE, "python tools/reference.py writes it anew"


def test_no_key_is_missing() -> None:
    for key in keys_of(RunConfig):
        group = next((group for group in ELSEWHERE if key.startswith(f"{group}.")), None)
        written = key if group is None else ELSEWHERE[group] + key.removeprefix(group)
        written = re.sub(r"^task\.(?=\w)", "task.N.", written)  # an entry of a list
        assert f"**`{written}`**" in PAGE, key


def test_no_flag_is_missing() -> None:
    for flag in (*OWN_FLAGS, *LAYOUT_FLAGS, *inspect.signature(read_flags).parameters):
        assert f"**`--{flag}`**" in PAGE, flag


class Inner(Section):
    share: float = Field(0.5, ge=0, lt=1)
    """Of a whole."""


class Outer(Section):
    inner: Inner | None = None
    """A group."""
    names: tuple[str, ...] = ("a", "")
    """Words."""


def test_a_row_says_what_a_key_may_be_and_what_it_is_by_default() -> None:
    assert [row.lines() for row in rows_of(Outer, "outer.")] == [
        "- **`outer.inner`** (group | null; default null): A group.",
        "- **`outer.inner.share`** (float >= 0 and < 1; default `0.5`): Of a whole.",
        '- **`outer.names`** (list of text; default `[a, ""]`): Words.',
    ]


def test_a_key_without_documentation_is_an_error() -> None:
    class Silent(Section):
        said: int = 1
        """It is."""
        unsaid: int = 2

    with pytest.raises(ValueError, match=r"silent\.unsaid: its field has no line of documentation under it"):
        rows_of(Silent, "silent.")
