"""Tasks of a run: what is refused before it starts, and what ends an evaluation."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from llm.errors import UserError
from llm.parallel.grid import Grid, make_grid
from llm.parallel.layout import Layout
from llm.parallel.replica import Replica
from llm.tokenizer import load_tokenizer
from llm.train.config import RunConfig, validate
from llm.train.dry_run import report
from llm.train.evaluation import RunTasks, evaluate, followed_in, open_run_tasks, opening_lines
from llm.train.preflight import ALONE, preflight
from llm.train.settle import with_vocabulary
from tests.distributed.harness import tiny_config, write_text

CHOICE: dict[str, Any] = {"kind": "multiple_choice", "prompt": "{{ q }}", "choices": "{{ c }}", "gold": "{{ g }}"}
TEXT: dict[str, Any] = {"kind": "perplexity", "prompt": "{{ q }}", "metrics": ["bits_per_byte", "ppl"]}
PLAIN: dict[str, Any] = {"dim": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": 64, "ffn_hidden": 16}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_text(tmp_path, documents=20)
    rows = [{"q": f"row {i} is", "c": ["odd", "even"], "g": i % 2} for i in range(150)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in {"choice": CHOICE, "text": TEXT}.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"name": name, "data": {"path": "rows.jsonl"}, **task}))
    both = {"name": "both", "kind": "group", "tasks": ["choice.yaml", "text.yaml"]}
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(both))
    return tmp_path


def config_with(folder: Path, *tasks: str, **evaluation: Any) -> RunConfig:
    given = {"tasks": [str(folder / f"{name}.yaml") for name in tasks], **evaluation}
    raw = tiny_config(folder, eval=given)
    return validate({**raw, "model": PLAIN}, "config")


def opened(config: RunConfig) -> RunTasks:
    tokenizer = load_tokenizer(config.tokenizer)
    return open_run_tasks(with_vocabulary(config, tokenizer), tokenizer, None)


@pytest.mark.parametrize(
    ("tasks", "evaluation", "message"),
    [
        (["gone"], {}, r"eval\.tasks: .*gone\.yaml: no such task file"),
        (["choice", "both"], {"best": "eval/arc/acc"}, r"no task of eval\.tasks is called arc; there are choice, text"),
        (["choice"], {"best": "eval/choice/ppl"}, r"choice has no metric ppl; it has acc, acc_norm"),
        (["both"], {"best": "eval/both/acc"}, r"both has no metric acc"),
        (["choice"], {"apply_chat_template": True}, r"the run writes no conversations, so it has no chat template"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_the_run_and_by_the_dry_run(
    folder: Path, tasks: list[str], evaluation: dict[str, Any], message: str
) -> None:
    config = config_with(folder, *tasks, **evaluation)
    with pytest.raises(UserError, match=message):
        preflight(config, folder / "run")
    assert not (folder / "run").exists()


def test_a_row_that_a_task_cannot_use_is_named_before_the_run(folder: Path) -> None:
    with (folder / "rows.jsonl").open("a") as file:
        file.write(json.dumps({"q": "?", "c": ["a", "b"], "g": 2}) + "\n")
    with pytest.raises(UserError, match=r"rows\.jsonl row 151: .*2"):
        preflight(config_with(folder, "choice"), folder / "run")
    preflight(config_with(folder, "choice", tasks_limit=150), folder / "run")


def test_the_dry_run_and_the_start_say_what_is_asked_and_how_often(folder: Path) -> None:
    config = config_with(folder, "both", tasks_limit=7, tasks_interval=30)
    (line,) = opening_lines(config, opened(config))
    asked = "7 documents of choice (14 requests), 7 documents of text (7 requests)"
    said = f"every 30 steps the model is evaluated on {asked}"
    assert line == said
    assert f"# {said}\n" in report(config, Layout(1), folder / "run")


def test_less_is_better_of_perplexities_and_other_documents_are_another_measurement(folder: Path) -> None:
    followed = {}
    for best, limit in (("eval/choice/acc", 5), ("eval/text/ppl", 5), ("eval/text/ppl", 6)):
        config = config_with(folder, "both", best=best, tasks_limit=limit)
        found = followed_in(config, None, opened(config))
        assert found is not None
        followed[best, limit] = found
    acc, ppl, more = followed.values()
    assert acc.higher_is_better and not ppl.higher_is_better
    assert (ppl.on.n_rows, more.on.n_rows) == (5, 6) and ppl.on.fingerprint != more.on.fingerprint
    assert more.on.described() == "6 documents of text (6 requests)"


@pytest.fixture
def grid() -> Grid:
    return make_grid(ALONE, Layout(1))


def test_an_evaluation_has_a_field_for_each_metric_and_ends_where_the_run_is_to_stop(folder: Path, grid: Grid) -> None:
    config = config_with(folder, "both")
    tokenizer = load_tokenizer(config.tokenizer)
    config = with_vocabulary(config, tokenizer)
    tasks, replica = opened(config), Replica.build(config.model, 1, grid)
    found = evaluate(replica, tasks, tokenizer, None, config)
    assert found is not None
    values = {name: value for name, value in found.items() if not name.endswith("_stderr")}
    assert list(values) == ["eval/choice/acc", "eval/choice/acc_norm", "eval/text/bits_per_byte", "eval/text/ppl"]
    # a model that has learned nothing takes about as many bits for a byte of text as one of 256 equally likely ones
    bits = values["eval/text/bits_per_byte"]
    assert bits is not None and bits == pytest.approx(8, abs=1)
    looks = iter([False, True])
    assert evaluate(replica, tasks, tokenizer, None, config, lambda: next(looks)) is None
    assert next(looks, None) is None, "it looked again between the first 128 documents and the rest"


def test_weights_that_are_no_numbers_are_refused_with_the_row_that_met_them(folder: Path, grid: Grid) -> None:
    config = config_with(folder, "choice", tasks_limit=3)
    tokenizer = load_tokenizer(config.tokenizer)
    config = with_vocabulary(config, tokenizer)
    replica = Replica.build(config.model, 1, grid)
    with torch.no_grad():
        next(replica.model.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match=r"eval\.tasks: task choice: .*rows\.jsonl row [123]: .*the last checkpoint"):
        evaluate(replica, opened(config), tokenizer, None, config)
