"""What is wrong with a task or its data: one line that names the file, and the row or key."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm.errors import UserError
from llm.evaluate.tasks import TaskOptions, open_task, open_tasks
from llm.evaluate.tasks.config import SHIPPED
from llm.evaluate.tasks.template import Template
from tests.evaluate.tasks import documents, made, targets

CHOICE: dict[str, Any] = {"kind": "multiple_choice", "prompt": "{{ q }}", "choices": "{{ c }}", "gold": "{{ g }}"}
GENERATE: dict[str, Any] = {"kind": "generate", "prompt": "{{ q }}", "gold": "{{ a }}"}
FINE = {"q": "x", "c": ["a", "b"], "g": 0}


def refused(folder: Path, rows: list[Any], context: int = 256, options: TaskOptions | None = None, **keys: Any) -> str:
    """The message, which is one line."""
    with pytest.raises(UserError) as found:
        documents(made(folder, rows, options, **keys), context)
    assert "\n" not in str(found.value)
    return str(found.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"q": "x", "g": 0}, "choices: 'c' is undefined (the row's columns: q, g)"),
        ({"q": "x", "c": [], "g": 0}, "has no choices"),
        ({"q": "x", "c": "ab", "g": 0}, "choices is a text, not a list"),
        ({"q": "x", "c": ["a", None], "g": 0}, "choices.1 is null, not a text"),
        ({"q": None, "c": ["a"], "g": 0}, "prompt is null, not a text"),
        ({"q": "x", "c": ["a", "b"], "g": 2}, "gold=2 is out of range: it has 2 choices, counted from 0"),
        ({"q": "x", "c": ["a", "b"], "g": -1}, "gold=-1 is out of range"),
        ({"q": "x", "c": ["a", "b"], "g": "c"}, "gold='c' is none of its choices"),
        ({"q": "x", "c": ["a", "b"], "g": True}, "gold is true or false, not the place of one of its choices"),
        ({"q": "x", "c": ["a", "b" * 300], "g": 0}, "choice 1 (from 0): a continuation of 301 tokens is longer"),
        ({"q": "\ud800", "c": ["a"], "g": 0}, "holds half a character"),
        ([1, 2], "a list where an object with columns must be"),
    ],
)
def test_a_row_that_is_wrong_is_named(tmp_path: Path, row: Any, message: str) -> None:
    found = refused(tmp_path, [FINE, FINE, row], **CHOICE)
    assert f"{tmp_path / 'rows.jsonl'} row 3: {message}" in found


def test_lines_count_as_rows_with_blank_ones_between(tmp_path: Path) -> None:
    task = made(tmp_path, [], **CHOICE)
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(FINE)}\n\n{{}}\n")
    with pytest.raises(UserError, match=r"rows\.jsonl row 3: choices: 'c' is undefined"):
        documents(task)


def test_a_line_that_is_no_json_is_named(tmp_path: Path) -> None:
    task = made(tmp_path, [], **CHOICE)
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(FINE)}\n{{\n")
    with pytest.raises(UserError, match=r"rows\.jsonl, line 2: not JSON"):
        documents(task)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (CHOICE | {"prompt": "{{ q.__class__.__mro__ }}"}, "prompt: the template reaches for .__class__ of a text"),
        (CHOICE | {"prompt": "{{ ''.__class__ }}"}, "prompt: the template reaches for .__class__"),
        (CHOICE | {"prompt": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"},
         "prompt: the template runs too long"),
        (CHOICE | {"prompt": "{{ q / 2 }}"}, "prompt: the template fails: TypeError"),
    ],
)  # fmt: skip
def test_a_template_that_reaches_out_or_fails_is_refused_at_the_first_row(
    tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    assert f"rows.jsonl row 1: {message}" in refused(tmp_path, [FINE], **keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (CHOICE | {"promt": "x"}, "unknown key promt; did you mean prompt?"),
        (CHOICE | {"gold": None}, "missing key gold"),
        (CHOICE | {"kind": None}, "missing key kind"),
        (CHOICE | {"kind": "choice"}, "kind='choice': no such kind; possible are multiple_choice, loglikelihood"),
        (CHOICE | {"kind": "prediction"}, "unknown key choices; known keys: name, kind, version, data, metrics"),
        (CHOICE | {"name": "a/b"}, "name='a/b': string should match pattern"),
        (CHOICE | {"choices": None}, "either prompt and choices are needed, or prompts and target; it has prompt"),
        (CHOICE | {"prompts": "{{ q }}"}, "either prompt and choices are needed, or prompts and target"),
        (CHOICE | {"metrics": ["bleu"]}, "metrics: multiple_choice has no 'bleu'; possible are acc, acc_norm"),
        (CHOICE | {"prompt": "{{ q"}, "prompt: not a template that can be used: line 1"),
        (CHOICE | {"prompt": "{% include 'x' %}{{ open('x') }}{% endfor %}"}, "prompt: not a template"),
        (CHOICE | {"data": {"path": "no.jsonl"}}, "data.path=no.jsonl: no such file or directory"),
        (CHOICE | {"data": {"path": []}}, "data.path"),
        (CHOICE | {"data": {"path": "rows.jsonl", "split": "x"}}, "data.split: "),
        (CHOICE | {"data": {"path": "rows.jsonl", "split": "("}}, "data.split: not a regular expression"),
        (CHOICE | {"fewshot": {"k": 1, "path": "no.jsonl"}}, "fewshot.path=no.jsonl: no such file or directory"),
        (CHOICE | {"fewshot": {"k": -1}}, "fewshot.k=-1: input should be greater than or equal to 0"),
        (GENERATE | {"extract": "("}, "extract: not a regular expression"),
        (GENERATE | {"stop": [""]}, "stop: an empty text ends every answer"),
        (GENERATE | {"samples": 3}, "samples=3: at temperature 0 all are the same"),
        (GENERATE | {"num_beams": 2, "temperature": 1.0}, "num_beams=2 does not go with temperature=1.0"),
        (GENERATE | {"num_beams": 2, "samples": 3}, "samples=3: a search (num_beams=2) gives one answer"),
        (GENERATE | {"length_penalty": 2}, "length_penalty=2.0 needs num_beams above 1"),
        (GENERATE | {"top_k": 3}, "top_k and top_p need a temperature above 0"),
        (GENERATE | {"metrics": ["pass@2"]}, "metrics: pass@2 needs at least 2 samples; samples=1"),
        (GENERATE | {"max_new_tokens": 0}, "max_new_tokens=0"),
    ],
)
def test_a_key_that_is_wrong_is_named_before_any_row_is_read(
    tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as found:
        made(tmp_path, [FINE], **keys)
    assert str(found.value).startswith(str(tmp_path / "t.yaml")) and message in str(found.value)
    assert "\n" not in str(found.value)


def test_an_unknown_task_names_those_that_there_are() -> None:
    with pytest.raises(UserError, match=r"unknown task 'arc_eazy': .*arc_easy.*winogrande"):
        open_task("arc_eazy")
    with pytest.raises(UserError, match=r"no_such/t\.yaml: no such task file"):
        open_task("no_such/t.yaml")


def test_a_file_that_is_no_task_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text("- a\n")
    with pytest.raises(UserError, match=r"t\.yaml: a task is a mapping"):
        open_task(str(tmp_path / "t.yaml"))
    (tmp_path / "t.yaml").write_text("a: [\n")
    with pytest.raises(UserError, match=r"t\.yaml: not YAML"):
        open_task(str(tmp_path / "t.yaml"))


def test_no_rows_and_too_few_examples_are_refused(tmp_path: Path) -> None:
    assert "data.path: has no rows" in refused(tmp_path, [], **CHOICE)
    message = refused(tmp_path, [FINE, FINE], fewshot={"k": 2}, **CHOICE)
    assert "fewshot.k=2: there are 1 rows to take examples from" in message


def test_an_example_that_is_wrong_is_named_by_its_own_row(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps(FINE | {"g": 5}) + "\n")
    message = refused(tmp_path, [FINE], fewshot={"k": 1, "path": "train.jsonl"}, **CHOICE)
    assert "train.jsonl row 1: gold=5 is out of range" in message and "rows.jsonl" not in message


def test_a_text_that_is_empty_is_refused(tmp_path: Path) -> None:
    assert "row 2: prompt: the text is empty" in refused(tmp_path, [{"text": "a"}, {"text": ""}], kind="perplexity")


def test_an_answer_for_which_there_is_no_room_is_refused(tmp_path: Path) -> None:
    message = refused(tmp_path, [{"q": "x", "a": "y"}], context=16, max_new_tokens=16, **GENERATE)
    assert "row 1: max_new_tokens=16 leaves no room for a prompt in the model's context of 16" in message


def test_a_group_that_holds_itself_and_two_tasks_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "g.yaml").write_text("{name: g, kind: group, tasks: [g.yaml]}")
    with pytest.raises(UserError, match="is a group that holds itself"):
        open_tasks([str(tmp_path / "g.yaml")])
    made(tmp_path, [FINE], **CHOICE)
    (tmp_path / "u.yaml").write_text((tmp_path / "t.yaml").read_text())
    with pytest.raises(UserError, match="two tasks are called t"):
        open_tasks([str(tmp_path / "t.yaml"), str(tmp_path / "u.yaml")])


def test_csv_and_parquet_are_read_and_their_rows_named(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("q,a,b,g\nx,one,two,1\ny,three,four,7\n")
    keys = CHOICE | {"choices": ["{{ a }}", "{{ b }}"], "data": {"path": "rows.csv"}}
    assert "rows.csv row 2: gold=7 is out of range" in refused(tmp_path, [], **keys)
    pq.write_table(pa.Table.from_pylist([FINE, FINE | {"g": 9}]), tmp_path / "rows.parquet")
    keys = CHOICE | {"data": {"path": "rows.parquet"}}
    assert "rows.parquet row 2: gold=9 is out of range" in refused(tmp_path, [], **keys)
    (document,) = documents(made(tmp_path, [], TaskOptions(limit=1), **keys))
    assert targets(document) == [" a", " b"]


def test_data_is_looked_for_beside_the_task_then_here_then_in_data_dirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("task", "here", "data"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    keys = CHOICE | {"data": {"path": "own.jsonl"}}
    options = TaskOptions(data_dirs=(tmp_path / "data",))
    for name in ("data", "here", "task"):
        (tmp_path / name / "own.jsonl").write_text(json.dumps(FINE | {"q": name}) + "\n")
        (document,) = documents(made(tmp_path / "task", [], options, **keys))
        assert document.prompt == name


def test_a_template_of_one_expression_keeps_its_type_and_any_other_is_a_text() -> None:
    row = {"a": [1, "x"], "n": 3, "t": "\n"}
    assert Template("{{ a }}", "k").value(row) == [1, "x"]
    assert Template("{{- a -}}", "k").value(row) == [1, "x"]
    assert Template("{{ n + 1 }}", "k").value(row) == 4
    assert Template("{{ a[1] }}{{ n }}", "k").value(row) == "x3"
    assert Template("{{ n }} ", "k").value(row) == "3 "
    assert Template("plain", "k").value(row) == "plain"


def test_line_ends_of_a_template_stay_as_they_are_written() -> None:
    assert Template("a {{ n }}\n", "k").text({"n": 1}) == "a 1\n"
    assert Template("{% if n %}\n  b\n{% endif %}\n", "k").text({"n": 1}) == "\n  b\n\n"


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_shipped_task_says_what_is_missing_where_its_data_is_not_there(
    file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    how = "; `.* makes it$" if file.stem in ("python_sources", "easy_vqa") else "--data_dir"  # or the user brings it
    with pytest.raises(UserError, match=rf"data\.path=\S+: no such file or directory, neither in .*{how}"):
        open_tasks([file.stem])


def test_shipped_tasks_are_called_as_their_files() -> None:
    assert all(re.search(rf"^name: {file.stem}$", file.read_text(), re.M) for file in SHIPPED.glob("*.yaml"))
