"""Prompts and completions: trained is what follows, to its end mark, whatever the tokenizer makes of the seam."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm.batch import IGNORE
from llm.data.packed import Packed
from llm.data.sources import SourceSpec
from llm.errors import UserError
from llm.tasks import RowsWanted, task_named
from llm.tokenizer import ByteTokenizer
from llm.train.preflight import ALONE
from tests.data.sample_helpers import chat, write_rows

BOS, EOS = ByteTokenizer.bos_id, ByteTokenizer.eos_id


def rows_of(folder: Path, rows: list[Any], columns: dict[str, str] | None = None, **options: Any) -> Packed:
    spec = SourceSpec(path=write_rows(folder / "a.jsonl", rows), kind="completion", columns=columns or {})
    wanted = RowsWanted([spec], None, str(folder / "cache"), 16, 0, None, chat=chat(**options))
    (source,) = task_named("lm").open_rows(wanted, ByteTokenizer(), ALONE).train.sources
    assert isinstance(source, Packed)
    return source


@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
def test_the_completion_and_its_end_are_trained(tmp_path: Path, train_on: str) -> None:
    row = rows_of(tmp_path, [{"prompt": "ab", "completion": "cd", "id": 7}], train_on=train_on).read(0, 0)
    a, b, c, d = b"abcd"
    assert row.tokens.tolist() == [BOS, a, b, c, d]
    expected = [a, b, c, d, EOS] if train_on == "all" else [IGNORE, IGNORE, c, d, EOS]
    assert row.targets["lm"].labels.tolist() == expected and row.targets["lm"].weights is None


def test_an_empty_completion_trains_its_end_and_columns_may_have_other_names(tmp_path: Path) -> None:
    row = rows_of(tmp_path, [{"q": "ab", "a": ""}], columns={"prompt": "q", "completion": "a"}).read(0, 0)
    assert row.targets["lm"].labels.tolist() == [IGNORE, IGNORE, EOS]


class Joining(ByteTokenizer):
    """Writes `bc` as one token."""

    vocab_size = ByteTokenizer.vocab_size + 1
    fingerprint = "joining"

    def encode(self, text: str) -> list[int]:
        parts = text.split("bc")
        joined = [[*super(Joining, self).encode(part), self.vocab_size - 1] for part in parts]
        return [token for part in joined for token in part][:-1]


def test_a_token_over_the_seam_is_trained(tmp_path: Path) -> None:
    from llm.data.completion import CompletionEncoder

    (sample,) = CompletionEncoder(Joining(), {}, whole=False).read({"prompt": "ab", "completion": "cd"}).samples()
    assert sample.tokens.tolist() == [BOS, ord("a"), Joining.vocab_size - 1, ord("d"), EOS]
    assert np.array_equal(sample.weights, [0, 0, 1, 1, 1])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, r"a\.jsonl, line 1: no column 'completion'; it has 'prompt'"),
        ({"prompt": "a", "completion": 3}, r"line 1: its column 'completion' is a number, not a text"),
        ({"prompt": "\ud800", "completion": ""}, r"line 1: its column 'prompt' has a lone surrogate"),
    ],
)
def test_a_row_without_the_columns_is_named(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        rows_of(tmp_path, [row])


def test_a_name_of_a_column_that_the_kind_has_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.train\.columns\.answer: kind completion has prompt, completion"):
        rows_of(tmp_path, [], columns={"answer": "a"})
