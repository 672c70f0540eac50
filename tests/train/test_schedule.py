"""The learning rate at named points of every schedule; steps of epochs under a changing batch size."""

import math
from pathlib import Path
from typing import Any

import pytest

from llm.data.loader import in_force
from llm.errors import UserError
from llm.train.config import OptimConfig, TrainConfig, validate
from llm.train.config.length import cut_short, default_warmup, misfit
from llm.train.schedule import epoch_rows, learning_rate, lr_factor, rows_of_step, steps_between
from tests.distributed.harness import tiny_config

STEPS = 100
FALLING = ("cosine", "linear", "wsd", "one_cycle")


def optim_with(**values: Any) -> OptimConfig:
    return OptimConfig(**{"lr": 1.0, "min_lr": 0.1, "warmup_steps": 10, **values})


@pytest.mark.parametrize("schedule", [*FALLING, "constant"])
def test_every_schedule_rises_to_its_peak_and_ends_where_it_says(schedule: str) -> None:
    optim = optim_with(schedule=schedule)
    rates = [learning_rate(optim, STEPS, step) for step in range(1, STEPS + 1)]
    assert rates[0] == pytest.approx(1 / 25 if schedule == "one_cycle" else 1 / 10) and rates[9] == 1.0
    assert all(later > earlier for earlier, later in zip(rates[:9], rates[1:10], strict=True))
    assert all(later <= earlier for earlier, later in zip(rates[9:], rates[10:], strict=False))
    assert rates[-1] == pytest.approx(1.0 if schedule == "constant" else 0.1)


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("linear", 55, 0.55),  # half-way from 1 at step 10 to 0.1 at step 100
        ("cosine", 55, 0.55),
        ("cosine", 32, 1 - 0.9 * 0.5 * (1 - math.cos(math.pi * 22 / 90))),
        ("one_cycle", 55, 0.55),
        ("one_cycle", 4, 1 / 25 + 24 / 25 * 0.5 * (1 - math.cos(math.pi / 3))),  # a third of the way up
        ("wsd", 80, 1.0),
        ("wsd", 85, 1 - 0.9 * 0.5),  # sqrt(5 / 20)
        ("constant", 99, 1.0),
    ],
)
def test_named_points(schedule: str, step: int, expected: float) -> None:
    assert learning_rate(optim_with(schedule=schedule), STEPS, step) == pytest.approx(expected)


def test_decay_steps_decide_where_wsd_falls() -> None:
    wsd = optim_with(schedule="wsd", min_lr=0.0, decay_steps=40)
    assert learning_rate(wsd, STEPS, 60) == 1.0 and learning_rate(wsd, STEPS, 70) == pytest.approx(0.5)


@pytest.mark.parametrize("schedule", [*FALLING, "constant"])
def test_the_factor_has_no_scale(schedule: str) -> None:
    small, large = optim_with(schedule=schedule), optim_with(schedule=schedule, lr=50.0, min_lr=5.0)
    for step in range(1, STEPS + 1):
        assert lr_factor(small, STEPS, step) == pytest.approx(lr_factor(large, STEPS, step), rel=1e-12)
        assert learning_rate(large, STEPS, step) == 50.0 * lr_factor(large, STEPS, step)


@pytest.mark.parametrize("schedule", [*FALLING, "constant"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 1), (2, 1), (5, 5), (3, 10)])
def test_a_run_as_short_as_its_warm_up_stays_within_its_bounds(schedule: str, steps: int, warmup: int) -> None:
    optim = optim_with(schedule=schedule, warmup_steps=warmup)
    assert all(0 < learning_rate(optim, steps, step) <= 1.0 for step in range(1, steps + 1))


def counted(train: TrainConfig, first: int, end: int) -> int:
    """Steps by going through them one by one."""
    steps = 0
    while first < end:
        first += in_force(train.global_batch_size, train.batch_schedule, first)
        steps += 1
    return steps


@pytest.mark.parametrize("schedule", [[], [[50, 24]], [[50, 24], [60, 8], [61, 40]], [[1, 3], [2, 5], [500, 7]]])
def test_steps_between_are_those_that_the_loader_makes(schedule: list[list[int]]) -> None:
    train = TrainConfig(global_batch_size=16, batch_schedule=schedule)  # type: ignore[arg-type]
    for first in (0, 16, 48, 60, 64, 700):
        for end in (0, 1, 16, 17, 49, 51, 60, 64, 99, 499, 600, 701):
            assert steps_between(train, first, end) == counted(train, first, end), (first, end)


def test_an_epoch_sees_every_row_and_a_tenth_of_1000_rows_is_100() -> None:
    assert epoch_rows(1.0, 1000) == 1000 and epoch_rows(0.1, 1000) == 100 and epoch_rows(0.3, 10) == 3
    assert epoch_rows(2.5, 3) == 8
    assert steps_between(TrainConfig(global_batch_size=64), 0, epoch_rows(1.0, 1000)) == 16  # 15.6 steps


def test_a_warm_up_that_is_not_given_fits_the_run() -> None:
    assert [default_warmup(steps, None) for steps in (1, 9, 10, 20, 500, 1000, 10**6)] == [0, 0, 1, 2, 50, 100, 100]
    assert default_warmup(20, 20) == 0 and default_warmup(1000, 950) == 50, "it leaves the decay its steps"
    optim = OptimConfig(lr=1.0, min_lr=0.1)
    rates = [learning_rate(optim, 20, step) for step in range(1, 21)]
    assert rates[0] == 0.5 and rates[1] == 1.0 and rates[-1] == pytest.approx(0.1)


def test_one_cycle_rises_for_three_tenths_of_the_run_where_its_rise_is_not_given() -> None:
    assert [default_warmup(steps, None, "one_cycle") for steps in (1, 10, 1000)] == [1, 3, 300]
    rates = [learning_rate(optim_with(schedule="one_cycle", warmup_steps=None), 10, step) for step in range(1, 11)]
    assert max(rates) == rates[2] == 1.0 and rates[0] == pytest.approx(1 / 25) and rates[-1] == pytest.approx(0.1)


def test_a_decay_that_is_not_given_leaves_the_warm_up_alone() -> None:
    rates = [learning_rate(optim_with(schedule="wsd", warmup_steps=9), 10, step) for step in range(1, 11)]
    assert rates[8] == 1.0 and rates[9] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("schedule", "warmup", "decay", "advice"),
    [
        ("wsd", 3, 10, "optim.decay_steps=7 or less"),
        ("wsd", 5, 8, "optim.decay_steps=5 or less"),
        ("wsd", None, 11, "optim.decay_steps=10 or less"),
    ],
)
def test_what_cannot_fit_is_refused_with_what_does(
    schedule: str, warmup: int | None, decay: int | None, advice: str
) -> None:
    text = misfit(warmup, decay, 10, "train.steps=10")
    assert text and advice in text and "train.steps=10" in text
    raw = tiny_config(Path("nowhere"), train={"steps": 10})
    raw["optim"] = {"lr": 1.0, "schedule": schedule, "warmup_steps": warmup, "decay_steps": decay}
    with pytest.raises(UserError, match=r"optim\.(warmup|decay)_steps"):
        validate(raw, "test.yaml")


@pytest.mark.parametrize(
    ("schedule", "warmup", "decay"),
    [
        *[("wsd", 3, 7), ("wsd", None, 10), ("wsd", 9, None)],
        *[("cosine", 9, None), ("cosine", None, None), ("constant", 100, None)],
    ],
)
def test_what_fits_passes(schedule: str, warmup: int | None, decay: int | None) -> None:
    assert misfit(warmup, decay, 10, "train.steps=10") is None
    assert (cut_short(schedule, warmup, 10) is None) == (warmup != 100)


@pytest.mark.parametrize("schedule", ["wsd", "cosine", "linear", "one_cycle"])
def test_a_warm_up_that_ends_with_the_run_is_said_and_may_run(schedule: str) -> None:
    text = cut_short(schedule, 10, 10)
    assert text and "optim.warmup_steps=10, train.steps=10" in text and "no step to come down" in text
    assert f"it is {3 if schedule == 'one_cycle' else 1} for this length" in text
    assert "gets to 10 of its 100 steps" in str(cut_short(schedule, 100, 10))
    raw = tiny_config(Path("nowhere"), train={"steps": 10})
    raw["optim"] = {"lr": 1.0, "schedule": schedule, "warmup_steps": 100}
    assert validate(raw, "test.yaml").optim.warmup_steps == 100


def test_the_rows_of_a_step_are_those_that_the_loader_gives_it() -> None:
    train = TrainConfig(global_batch_size=16, batch_schedule=((50, 24), (60, 8)))
    row = 0
    for step in range(1, 12):
        size = in_force(16, train.batch_schedule, row)
        assert rows_of_step(train, 0, 0, step) == (row, row + size)
        row += size
