"""When a run has stopped getting better."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest

from llm.data.heldout import HeldOut
from llm.errors import UserError
from llm.train.best import Best
from llm.train.config import RunConfig, validate
from llm.train.config.outputs import higher_is_better
from llm.train.settle import settle_rows
from tests.distributed.harness import tiny_config


def test_patience_counts_validations_since_the_best() -> None:
    best = Best()
    seen = [(best.update(loss, step), best.exhausted(2)) for step, loss in enumerate([3.0, 2.0, 2.5, 1.9, 1.9, 2.0], 1)]
    assert seen == [(True, False), (True, False), (False, False), (True, False), (False, False), (False, True)]
    assert (best.valid_loss, best.step) == (1.9, 4)


def test_no_patience_is_endless_and_more_patience_goes_on() -> None:
    best = Best(valid_loss=1.0, step=1, since=5)
    assert not best.exhausted(None) and best.exhausted(5) and not best.exhausted(6)


def test_it_survives_a_checkpoint_also_one_from_before_patience() -> None:
    best = Best(valid_loss=1.0, step=1, since=5)
    assert Best(**asdict(best)) == best
    assert Best(**{"valid_loss": 1.0, "step": 1}) == Best(1.0, 1, 0)


def test_a_metric_of_a_task_may_rise_or_fall_and_without_a_value_is_not_better() -> None:
    rising, falling = Best(metric="eval/arc/acc", higher_is_better=True), Best(metric="eval/wiki/ppl")
    seen = [(rising.update(v, i), falling.update(v, i)) for i, v in enumerate([0.5, None, 0.7, 0.5, 0.7, 0.4])]
    assert seen == [
        (True, True), (False, False), (True, False), (False, False), (False, False), (False, True)
    ]  # fmt: skip
    assert (rising.score, rising.step, rising.since) == (0.7, 2, 3) and rising.valid_loss is None
    assert "3 validations (eval.patience=3) without eval/arc/acc above the 0.7000 of step 2" in rising.gave_up(3)
    assert "without eval/wiki/ppl below the 0.4000 of step 5" in falling.gave_up(3)
    assert "without a value of eval/arc/acc" in Best(metric="eval/arc/acc", since=2).gave_up(2)


def test_a_checkpoint_says_what_is_followed_where_that_is_not_the_loss() -> None:
    assert Best(valid_loss=1.0, step=3).state() == {
        "valid_loss": 1.0, "step": 3, "since": 0, "rows": None, "held_out": None
    }  # fmt: skip
    followed = Best(step=3, metric="eval/arc/acc", score=0.5, higher_is_better=True)
    assert Best(**followed.state()) == followed


class Rows(NamedTuple):
    """What Best asks of held-out rows."""

    n_rows: int
    fingerprint: str

    def described(self) -> str:
        return f"{self.n_rows} of 99 held-out rows"


def on(best: Best, rows: Rows) -> tuple[Best, list[str]]:
    return best.on(cast(HeldOut, rows))


def test_the_same_held_out_rows_keep_best_and_patience() -> None:
    best = Best(valid_loss=1.0, step=1, since=5, rows=8, held_out="a")
    assert on(best, Rows(8, "a")) == (best, [])


def test_other_held_out_rows_begin_best_and_patience_anew_and_say_so() -> None:
    fresh, lines = on(Best(valid_loss=1.0, step=7, since=5, rows=8, held_out="a"), Rows(9, "b"))
    assert fresh == Best(rows=9, held_out="b") and not fresh.exhausted(1)
    (line,) = lines
    assert "8 rows -> 9 of 99 held-out rows" in line and "1.0000 of step 7" in line
    # also before there was a best: the change itself is news
    assert on(Best(rows=8, held_out="a"), Rows(8, "b"))[1] == [
        "changed: a validation reads other rows now: 8 rows -> 8 of 99 held-out rows"
    ]


def test_another_metric_begins_best_and_patience_anew_and_says_so() -> None:
    before = Best(valid_loss=1.0, step=7, since=5, rows=8, held_out="a")
    fresh, (line,) = before.on(cast(HeldOut, Rows(9, "b")), "eval/arc/acc", higher_is_better=True)
    assert fresh == Best(rows=9, held_out="b", metric="eval/arc/acc", higher_is_better=True)
    assert line.startswith("changed: eval.best valid_loss -> eval/arc/acc; the best validation loss so far, 1.0000")
    fresh.update(0.5, 9)
    assert fresh.on(cast(HeldOut, Rows(9, "b")), "eval/arc/acc", True) == (fresh, [])
    _, (line,) = fresh.on(cast(HeldOut, Rows(8, "a")))
    assert "eval.best eval/arc/acc -> valid_loss; the best eval/arc/acc so far, 0.5000 of step 9" in line


def test_the_best_of_a_field_that_is_now_to_fall_begins_anew() -> None:
    rising = Best(metric="valid_zeal", score=0.5, step=3, rows=8, held_out="a", higher_is_better=True)
    fresh, (line,) = rising.on(cast(HeldOut, Rows(8, "a")), "valid_zeal", higher_is_better=False)
    assert fresh.score is None and not fresh.higher_is_better
    assert line.startswith("changed: the lowest valid_zeal is the best now (eval.best_mode); the best valid_zeal so")


@pytest.mark.parametrize(
    ("field", "expected"),
    [("valid_roc_auc", True), ("valid_prediction_r2", True), ("valid_lm_ppl", False), ("valid_loss_ema", False),
     ("valid_mlm_acc", True), ("valid_zeal", None), ("valid_dracc", None)],
)  # fmt: skip
def test_known_metrics_say_whether_they_are_to_rise_or_to_fall(field: str, expected: bool | None) -> None:
    assert higher_is_better(field) is expected


def test_a_best_from_before_rows_were_kept_counts_no_more() -> None:
    fresh, lines = on(Best(**{"valid_loss": 1.0, "step": 1}), Rows(9, "b"))
    assert fresh == Best(rows=9, held_out="b") and len(lines) == 1 and "does not say" in lines[0]
    assert on(Best(), Rows(9, "b")) == (Best(rows=9, held_out="b"), [])


def config_with(tmp_path: Path, **evaluation: Any) -> RunConfig:
    return validate(tiny_config(tmp_path, eval=evaluation), "test.yaml")


def test_batches_are_read_as_rows_of_the_whole_job(tmp_path: Path) -> None:
    assert config_with(tmp_path).eval.rows == 512
    config = config_with(tmp_path, batches=3)
    assert config.eval.rows == 48
    settled, reported = settle_rows(config)
    assert (settled.eval.rows, settled.eval.batches) == (48, None)
    assert "3 x train.global_batch_size=16 rows" in reported and "eval.rows=48" in reported
    assert config_with(tmp_path, batches=None).eval.rows is None, "what it meant: the whole held-out text"
    for resolved in (config, settled, config_with(tmp_path, rows=None), config_with(tmp_path, rows=5)):
        assert validate(resolved.model_dump(mode="json"), "again") == resolved


@pytest.mark.parametrize("rows", [24, None])
def test_rows_and_batches_together_are_refused(tmp_path: Path, rows: int | None) -> None:
    with pytest.raises(UserError, match=r"eval\.rows=.* and eval\.batches=3 .*= 48 rows\).*set eval\.batches to null"):
        config_with(tmp_path, rows=rows, batches=3)
