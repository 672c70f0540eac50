"""Kinds of data by name, and one from a file outside the tree."""

from pathlib import Path

import numpy as np
import pytest

from llm import extensions
from llm.data.kinds import KINDS, Kind, register
from llm.data.sources import SourceSpec
from llm.errors import UserError
from llm.tasks import RowsWanted, task_named
from llm.tokenizer import ByteTokenizer
from llm.train.preflight import ALONE
from tests.data.helpers import loader_of
from tests.data.sample_helpers import random_rows, write_rows

ROOT = Path(__file__).resolve().parents[2]
T = 32


@pytest.fixture(scope="module")
def intervals() -> None:
    extensions.load([ROOT / "docs/extend/intervals.py"])


def wanted(folder: Path, specs: list[SourceSpec], valid: list[SourceSpec] | float | None = None) -> RowsWanted:
    return RowsWanted(specs, valid, str(folder / "cache"), T, seed=1, held_out_rows=None)


def test_a_kind_of_one_file_outside_the_tree_mixes_with_others(tmp_path: Path, intervals: None) -> None:
    (tmp_path / "steps.txt").write_text("\n".join(map(str, range(1, 41))))
    (tmp_path / "held.txt").write_text("7\n9\n")
    (tmp_path / "text.txt").write_text("some text " * 100)
    chats = write_rows(tmp_path / "chats.jsonl", random_rows(50, longest=T))
    specs = [
        SourceSpec(path=str(tmp_path / "steps.txt"), kind="intervals"), SourceSpec(path=str(tmp_path / "text.txt")),
        SourceSpec(path=chats, kind="byte_samples"),
    ]  # fmt: skip
    held = [SourceSpec(path=str(tmp_path / "held.txt"), kind="intervals")]
    opened = task_named("lm").open_rows(wanted(tmp_path, specs, held), ByteTokenizer(), ALONE)
    mixture = opened.train
    assert f"data.train.0.path={specs[0].path}: 40 steps" in opened.notes
    assert opened.valid is not None and opened.valid.n_rows == 2
    sources, rows, epochs = mixture.locate(np.arange(600))
    with loader_of(mixture, 600, 600, 0, 1) as loader:
        (batch,) = loader.next().micro_batches
    for i in np.flatnonzero(sources == 0)[:50].tolist():
        expected = (epochs[i] + (rows[i] + 1) * np.arange(T)) % ByteTokenizer().vocab_size
        assert batch.inputs.tokens[i].tolist() == expected.tolist()
    assert set(epochs[sources == 0].tolist()) > {0, 1}


def test_what_it_refuses_is_said(tmp_path: Path, intervals: None) -> None:
    (tmp_path / "steps.txt").write_text("1\ntwo\n")
    spec = [SourceSpec(path=str(tmp_path / "steps.txt"), kind="intervals")]
    with pytest.raises(UserError, match=r"steps\.txt, line 2: 'two' is no number"):
        task_named("lm").open_rows(wanted(tmp_path, spec), ByteTokenizer(), ALONE)


def test_rows_without_the_targets_of_the_task_are_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"one": "abc", "other": "de"}])
    specs = [SourceSpec(path=path, kind="byte_pairs")]
    with pytest.raises(UserError, match=r"a\.jsonl: its rows have targets for dpo, and task=lm trains on those for lm"):
        task_named("lm").open_rows(wanted(tmp_path, specs), ByteTokenizer(), ALONE)


def test_a_name_is_given_once() -> None:
    with pytest.raises(ValueError, match="a kind of data is called text already"):
        register(KINDS["text"])
    assert isinstance(KINDS["text"], Kind)
