"""What a run says about keys of its config that it does not follow, or not to their end."""

from pathlib import Path
from typing import Any

import pytest

from llm.parallel.layout import Layout
from llm.train.config import validate
from llm.train.dry_run import report
from llm.train.notes import config_notes
from llm.train.resume.skipped_steps import SkippedSteps
from tests.distributed.harness import TINY_MODEL, tiny_config


def notes(tmp_path: Path, *lengths: int, step: int = 0, rows: int = 0, **sections: Any) -> list[str]:
    task = sections.pop("task", "lm")
    config = validate({**tiny_config(tmp_path, **sections), "task": task}, "config")
    return config_notes(config, [[0] * length for length in lengths], step, rows)


def test_a_config_that_is_followed_has_no_notes(tmp_path: Path) -> None:
    plan = {"skip_steps": [20], "batch_schedule": [[64, 32]], "seq_len_schedule": [[0, 24], [560, 12]]}
    sample = {"sample_interval": 10, "sample_tokens": 60, "prompts": ["abc"], "rows": 5}
    # 4 steps of 16 rows, then 16 of 32: the last begins at row 544, so that the one of row 560 is too late
    assert notes(tmp_path, 4, train={**plan, "seq_len_schedule": [[0, 24], [544, 12]]}, eval=sample) == []
    (line,) = notes(tmp_path, 4, train=plan, eval=sample)
    assert line == "note: train.seq_len_schedule.1 begins at row 560, which the run's 20 steps do not reach"


def test_a_plan_is_counted_from_where_the_run_stands(tmp_path: Path) -> None:
    plan = {"batch_schedule": [[319, 32], [320, 16], [400, 32]]}
    (line,) = notes(tmp_path, train=plan)
    assert line.startswith("note: train.batch_schedule.0 begins at row 319")  # 20 steps end with row 320
    # with larger batches before, the first two are in force already and the third comes
    assert notes(tmp_path, train=plan, step=10, rows=320) == []


def test_steps_to_pass_over_that_the_run_does_not_have_are_said(tmp_path: Path) -> None:
    (line,) = notes(tmp_path, train={"skip_steps": [3, 21, 40]})
    assert line.startswith("note: train.skip_steps=[21, 40]: the last step is 20")


def test_steps_to_pass_over_that_are_done_are_said() -> None:
    train = validate(tiny_config(Path("unused"), train={"skip_steps": [3, 5, 12]}), "config").train
    skipped = SkippedSteps()
    skipped.load({"skip_steps": [[3, 32, 48]]}, step=10)  # it was passed over
    (line,) = skipped.missed(train, 10)
    assert line.startswith("note: train.skip_steps=[5]: the run is at step 10, and has trained")


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"checkpoint": {"keep_best": True}}, "no validation: checkpoint.keep_best has no effect"),
        ({"eval": {"interval": 7, "rows": 8}}, "no validation: eval.interval and eval.rows have no effect"),
        ({"checkpoint": {"keep_best": False}}, None),
    ],
)
def test_keys_of_a_validation_without_held_out_text_are_said(
    tmp_path: Path, sections: dict[str, Any], expected: str | None
) -> None:
    found = notes(tmp_path, **{"data": {"valid": None}, "eval": {"interval": 100}, **sections})
    assert [line.split("there is ")[1] for line in found] == ([] if expected is None else [expected])


def test_a_sample_that_the_context_ends_is_said_with_its_length(tmp_path: Path) -> None:
    (line,) = notes(tmp_path, 1, 10, 3, eval={"sample_interval": 5, "sample_tokens": 55})
    assert line == (
        "note: the context of 64 tokens (model.max_seq_len) ends a sample of eval.prompts.1 (10 of them) after 54, "
        "not eval.sample_tokens=55"
    )
    assert notes(tmp_path, 1, 10, 3, eval={"sample_interval": 5, "sample_tokens": 54}) == []
    (line,) = notes(tmp_path, 1, 10, 3, eval={"sample_tokens": 55})
    assert line == "note: without eval.sample_interval there are no samples: eval.sample_tokens has no effect"


def test_the_dry_run_says_them_too(tmp_path: Path) -> None:
    eval_ = {"sample_interval": 5, "sample_tokens": 100, "prompts": ["ab"]}
    text = report(validate(tiny_config(tmp_path, train={"skip_steps": [99]}, eval=eval_), "config"), Layout(1))
    assert "# note: train.skip_steps=[99]" in text and "# note: the context of 64 tokens" in text


def test_a_resolved_config_says_no_more_than_the_one_it_came_from(tmp_path: Path) -> None:
    config = validate(tiny_config(tmp_path), "config")
    assert config_notes(validate(config.model_dump(mode="json"), "again")) == config_notes(config) == []


def test_keys_of_tasks_without_tasks_and_intervals_of_tasks_without_held_out_text(tmp_path: Path) -> None:
    (line,) = notes(tmp_path, eval={"tasks_limit": 3, "apply_chat_template": True})
    assert line == (
        "note: without eval.tasks the model is evaluated on none: eval.tasks_limit and eval.apply_chat_template "
        "have no effect"
    )
    tasks = {"tasks": ["a.yaml"], "best": "eval/a/acc", "interval": 7, "patience": 3}
    keep = {"keep_best": True}
    assert notes(tmp_path, data={"valid": None}, eval=tasks, checkpoint=keep) == [], "the interval of the tasks"
    (line,) = notes(tmp_path, data={"valid": None}, eval={**tasks, "tasks_interval": 2}, checkpoint=keep)
    assert line.endswith("eval.interval has no effect")


def test_a_matrix_that_nothing_reads_and_that_weight_decay_shrinks_is_said(tmp_path: Path) -> None:
    labels = {name: [{"path": "rows.jsonl", "kind": "labelled"}] for name in ("train", "valid")}
    head = {**TINY_MODEL, "n_prediction": 3}
    (line,) = notes(tmp_path, model=head)
    assert line.startswith("note: nothing that the run trains for reads prediction.weight, and optim.weight_decay shr")
    (line,) = notes(tmp_path, task="prediction", model=head, data=labels)
    assert "reads output.weight" in line and 'train.freeze: ["output.*"] leaves it as it is' in line
    for changed in ({"model": {**head, "tie_embeddings": True}}, {"train": {"freeze": ["output.*"]}, "model": head}):
        assert notes(tmp_path, task="prediction", data=labels, **changed) == []
    assert notes(tmp_path, model=head, optim={"weight_decay": 0.0}) == []
