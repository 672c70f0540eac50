"""What is said, refused and passed over when a run goes on otherwise than its checkpoint."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from llm.data.source import TokenSource
from llm.parallel.layout import Layout
from llm.train.config import RunConfig, TrainConfig, validate
from llm.train.resume.changes import change_notes, data_note, refused_data_changes
from llm.train.resume.skipped_steps import SkippedSteps, guard_state
from tests.data.helpers import make_source, mixture_of, random_texts
from tests.distributed.harness import tiny_config

T = 16


def config_with(**sections: dict[str, Any]) -> RunConfig:
    return validate(tiny_config(Path("nowhere"), **sections), "test.yaml")


def meta_of(config: RunConfig, world: int = 1, consumed: int = 0, **more: Any) -> dict[str, Any]:
    """What a checkpoint keeps."""
    layout = asdict(Layout(world=world))
    return {"config": config.model_dump(mode="json"), "layout": layout, "data": {"consumed": consumed}, **more}


def test_an_unchanged_run_goes_on_without_a_word() -> None:
    assert change_notes(meta_of(config_with()), config_with(), 1, 5) == []


def test_each_change_is_one_line_from_old_to_new() -> None:
    now = config_with(
        train={"global_batch_size": 32, "micro_batch_size": 8, "batch_schedule": [[64, 16]]},
        parallel={"zero_stage": 2, "timeout_s": 5},
        log={"interval": 1},
    )
    assert change_notes(meta_of(config_with()), now, 2, 5) == [
        "changed: ranks 1 -> 2",
        "changed: parallel.zero_stage 1 -> 2",
        "changed: train.batch_schedule [] -> [[64, 16]]",
        "changed: train.global_batch_size 16 -> 32",
        "changed: train.micro_batch_size 4 -> 8",
    ]


def test_a_finished_run_with_more_steps_says_from_which_to_which_learning_rate() -> None:
    now = config_with(train={"steps": 40})
    assert change_notes(meta_of(config_with()), now, 1, 20) == [
        "changed: train.steps 20 -> 40: learning rate 1.00e-04 at step 20, 6.10e-04 at step 21"
    ]
    (line,) = change_notes(meta_of(config_with()), now, 1, 10)
    assert line.endswith("learning rate 7.75e-04 at step 10, 9.36e-04 at step 11; it would have been 6.89e-04")


def test_a_schedule_that_does_not_see_the_length_says_only_that_it_stays() -> None:
    optim = {"schedule": "constant"}
    before, now = config_with(optim=optim), config_with(optim=optim, train={"steps": 40})
    (line,) = change_notes(meta_of(before), now, 1, 20)
    assert line.endswith("learning rate 1.00e-03 at step 20, 1.00e-03 at step 21")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[TokenSource]:
    folder = tmp_path_factory.mktemp("resume")
    return [make_source(folder / name, random_texts(30, seed)) for seed, name in enumerate("ab")]


@pytest.mark.parametrize(
    ("number", "seq_len", "seed", "allowed"),
    [(1, T, 0, "data"), (0, T // 2, 0, "train.seq_len"), (0, T, 7, "train.seed"), (0, T // 2, 7, "train")],
)
def test_rows_of_another_order_are_counted_from_0_where_that_was_allowed(
    sources: list[TokenSource], number: int, seq_len: int, seed: int, allowed: str
) -> None:
    state = mixture_of([("text", sources[0], 1.0)], T, seed=0).state(77)
    now = mixture_of([("text", sources[number], 1.0)], seq_len, seed)
    (refused,) = refused_data_changes(now, state, ())
    assert "--checkpoint.allow_changes=[data]" in refused and "model.init_from" in refused
    assert refused_data_changes(now, state, (allowed,)) == refused_data_changes(now, state, ("data",)) == []
    line = data_note(now, state)
    assert line and "counted from 0, after 77 rows of the data before" in line
    assert refused_data_changes(now, now.state(5), ()) == [] and data_note(now, now.state(5)) is None


def test_steps_to_skip_keep_the_rows_that_they_had_when_they_were_named() -> None:
    skipped = SkippedSteps()
    skipped.settle(TrainConfig(global_batch_size=8, skip_steps=(2, 5)), step=2, consumed=16, earlier=0)
    assert skipped.ranges == [(32, 40)], "step 2 is behind"
    again = SkippedSteps()
    again.load({"skip_steps": skipped.state()}, step=3)
    plan = TrainConfig(global_batch_size=16, skip_steps=(5, 6))
    again.settle(plan, step=3, consumed=24, earlier=0)
    assert again.state() == [[5, 32, 40], [6, 56, 72]], "step 5 as it was, step 6 by the new plan"
    again.settle(plan.model_copy(update={"skip_steps": (6,)}), step=3, consumed=24, earlier=0)
    assert again.state() == [[6, 56, 72]], "no more asked for"


def test_steps_to_skip_follow_the_batch_schedule_by_the_rows_of_the_whole_run() -> None:
    plan = TrainConfig(global_batch_size=8, batch_schedule=((24, 4),), skip_steps=(5,))
    skipped = SkippedSteps()
    skipped.settle(plan, step=0, consumed=0, earlier=0)
    assert skipped.ranges == [(28, 32)]
    of_new_data = SkippedSteps()
    of_new_data.settle(plan, step=2, consumed=0, earlier=16)  # rows 16 to 23, then by four
    assert of_new_data.ranges == [(12, 16)]


def test_a_checkpoint_from_before_rows_were_kept_has_its_own_plan_for_its_steps() -> None:
    config = config_with(train={"global_batch_size": 8, "skip_steps": [6]})
    meta = meta_of(config, consumed=24, guard={"passed_over": [2, 5], "events": 1, "losses": []})
    assert guard_state(meta, 3) == {"passed_over": [2, 5], "events": 1, "losses": [], "rows_passed_over": [(32, 40)]}
    skipped = SkippedSteps()
    skipped.load(meta, 3)
    skipped.settle(TrainConfig(global_batch_size=16, skip_steps=(6,)), step=3, consumed=24, earlier=0)
    assert skipped.ranges == [(40, 48)]
