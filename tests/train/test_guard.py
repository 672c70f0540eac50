"""The policy for steps that go wrong."""

import math
from types import SimpleNamespace

import pytest

from llm.batch import Counts
from llm.data.batch import StepBatch
from llm.errors import UserError
from llm.parallel.engine import deepspeed_private as private
from llm.parallel.engine.step import Overflows, Skipped, StepResult
from llm.train.config import GuardConfig
from llm.train.guard import Guard, part_passed_over

TEN = Counts(10, 10, {"lm": 10}, {})


def result(loss: float, skipped: Skipped | None = None) -> StepResult:
    return StepResult(loss, {"lm": loss}, {}, 1.0, TEN, None, skipped=skipped, culprits=["rank 1: a row"])


SIZE = (8, 48)


def judge(guard: Guard, step: int, found: StepResult, size: tuple[int, int] = SIZE) -> tuple[str, list[str]]:
    """Step `step` of steps of 8 rows."""
    return guard.judge(step, found, (8 * step - 8, 8 * step), size)


def filled(config: GuardConfig, loss: float = 2.0) -> Guard:
    guard = Guard(config)
    for step in range(config.spike_window):
        assert judge(guard, step + 1, result(loss + 0.01 * (step % 3))) == ("go on", [])
    return guard


def test_raise_names_step_rank_and_rows() -> None:
    with pytest.raises(UserError, match=r"step 7: the loss is nan \(rank 1: a row\).*guard.nonfinite=raise"):
        judge(Guard(GuardConfig()), 7, result(math.nan, "loss"))


def test_skip_goes_on_until_there_are_too_many() -> None:
    guard = Guard(GuardConfig(nonfinite="skip", max_events=2))
    for step in (3, 4):
        action, lines = judge(guard, step, result(1.0, "gradient"))
        assert action == "go on" and "no update" in lines[0] and "rank 1" in lines[0]
    with pytest.raises(UserError, match=r"guard.max_events=2"):
        judge(guard, 5, result(1.0, "gradient"))


def test_rewind_remembers_the_step_through_the_checkpoint_it_goes_back_to() -> None:
    guard = Guard(GuardConfig(nonfinite="rewind"))
    before = guard.state()
    assert judge(guard, 9, result(math.inf, "loss"))[0] == "rewind"
    guard.load(before)
    assert guard.passed_over == [(64, 72)] and guard.events == 1


def test_a_loss_scale_that_finds_its_size_is_no_event() -> None:
    guard = Guard(GuardConfig(max_events=0))
    overflow = StepResult(2.0, {"lm": 2.0}, {}, math.inf, TEN, None, loss_scale=512.0, skipped="overflow")
    assert judge(guard, 1, overflow) == ("go on", ["step 1: fp16 overflow; no update, loss scale now 512"])


@pytest.mark.parametrize("policy", ["skip", "rewind"])
def test_a_spike_has_a_limit_only_once_the_window_is_full(policy: str) -> None:
    config = GuardConfig.model_validate({"spike": policy, "spike_window": 8, "spike_threshold": 6.0})
    assert Guard(config).loss_limit(SIZE) is None
    limit = filled(config).loss_limit(SIZE)
    # median 2.01, median absolute deviation 0.01: six robust deviations are 0.089
    assert limit == pytest.approx(2.01 + 6 * 1.4826 * 0.01)


def test_losses_that_do_not_vary_make_no_spike_of_rounding() -> None:
    config = GuardConfig(spike="skip", spike_window=8, spike_threshold=2.0)
    guard = Guard(config)
    for step in range(8):
        judge(guard, step + 1, result(3.0))
    assert guard.loss_limit(SIZE) == pytest.approx(3.0 + 2 * 0.005 * 3.0)


def test_warn_trains_on_and_says_so_and_off_says_nothing() -> None:
    warned = filled(GuardConfig(spike="warn", spike_window=8))
    assert warned.loss_limit(SIZE) is None
    action, lines = judge(warned, 9, result(50.0))
    assert action == "go on" and len(lines) == 1 and "guard.spike=warn" in lines[0]
    assert judge(filled(GuardConfig(spike="off", spike_window=8)), 9, result(50.0)) == ("go on", [])


def test_a_spike_that_was_vetoed_does_not_enter_the_window() -> None:
    guard = filled(GuardConfig(spike="skip", spike_window=8))
    limit = guard.loss_limit(SIZE)
    assert judge(guard, 9, result(50.0, "limit"))[0] == "go on"
    assert guard.loss_limit(SIZE) == limit and guard.events == 1


def test_a_loss_is_compared_with_those_of_steps_of_its_size_only() -> None:
    guard = filled(GuardConfig(spike="skip", spike_window=8))
    assert guard.loss_limit(SIZE) is not None
    assert guard.loss_limit((4, 48)) is None and guard.loss_limit(SIZE) is None, "the window begins anew"
    again = filled(GuardConfig(spike="skip", spike_window=8))
    kept = Guard(again.config)
    kept.load(again.state())
    assert kept.loss_limit(SIZE) == again.loss_limit(SIZE) is not None
    assert kept.loss_limit((8, 24)) is None, "shorter sequences have another level"


def test_other_data_has_other_rows_and_losses() -> None:
    guard = filled(GuardConfig(nonfinite="rewind", spike="skip", spike_window=8))
    judge(guard, 9, result(math.inf, "loss"))
    guard.forget_data()
    assert guard.passed_over == [] and guard.loss_limit(SIZE) is None and guard.events == 1


def test_a_gradient_that_is_not_finite_at_the_lowest_scale_is_no_overflow() -> None:
    overflows = Overflows()
    found = [overflows.why(at_lowest=scale == 1) for scale in (4, 2, 1)]
    assert found == ["overflow", "overflow", "gradient"]


def test_overflows_in_a_row_after_a_step_that_went_well_end_as_what_no_scale_cures() -> None:
    overflows = Overflows()
    seeking = [overflows.why(at_lowest=False) for _ in range(2 * Overflows.MOST_IN_A_ROW)]
    assert set(seeking) == {"overflow"}, "at first the scale seeks its size"
    overflows.applied()
    assert {overflows.why(at_lowest=False) for _ in range(Overflows.MOST_IN_A_ROW)} == {"overflow"}
    assert overflows.why(at_lowest=False) == "gradient"
    overflows.applied()
    assert overflows.why(at_lowest=False) == "overflow"


def test_fp16_says_how_far_its_scale_had_fallen_and_who_was_it() -> None:
    broken = StepResult(2.0, {"lm": 2.0}, {}, math.inf, TEN, None, loss_scale=1.0, skipped="gradient")
    broken.culprits = ["rank 1: a gradient of rows 4 to 7 is not finite"]
    with pytest.raises(UserError, match=r"step 9: the gradient is not finite, .* scale fell to 1 \(rank 1: a gradient"):
        judge(Guard(GuardConfig()), 9, broken)


def test_the_loss_scaler_of_deepspeed_does_not_end_the_process_at_its_lowest_scale(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loss_scaler = pytest.importorskip("deepspeed.runtime.fp16.loss_scaler")
    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 1)
    scaler = loss_scaler.DynamicLossScaler(4.0, 1000, 1, 1, False)
    optimizer = SimpleNamespace(loss_scaler=scaler, _update_scale=scaler.update_scale)
    engine = SimpleNamespace(optimizer=optimizer)
    private.grow_loss_scale_late(engine)
    lowest = []
    for _ in range(4):
        lowest.append(private.loss_scale_is_lowest(engine))
        optimizer._update_scale(True)
    assert lowest == [False, False, True, True] and scaler.cur_scale == 1.0
    assert private.loss_scale_is_lowest(SimpleNamespace(optimizer=None)), "a fixed scale does not fall"


def test_a_step_that_lacks_some_of_its_rows_says_which() -> None:
    def lacking(*ranges: tuple[int, int]) -> list[str]:
        return part_passed_over(5, StepBatch([], TEN, first_row=32, n_rows=8, wait_s=0.0, passed_over=ranges))

    assert lacking() == lacking((32, 40)) == [], "a step that lacks all of them has a line of its own"
    assert lacking((32, 34), (36, 37)) == [
        "step 5: passed over rows 32 to 33, 36; an update from its other rows"
    ]
