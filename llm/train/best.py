"""The best that a run has reached in what it follows, and when it has stopped getting better."""

from dataclasses import asdict, dataclass
from typing import Any, Protocol

VALID_LOSS = "valid_loss"


class Measured(Protocol):
    """Rows or documents that a metric is measured on."""

    @property
    def n_rows(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """Others have another one."""

    def described(self) -> str:
        """For messages."""


@dataclass(frozen=True)
class Followed:
    """What decides which checkpoint is the best, and when a run ends early: `eval.best`."""

    metric: str
    """a field of metrics.jsonl"""
    higher_is_better: bool
    on: Measured


@dataclass
class Best:
    """The best validation so far: lowest loss (nats), or best metric of a validation or task; its step, and how many
    validations since were not better. `rows` and `held_out` (a fingerprint) are the held-out rows, or the documents of
    the task, that all of these were measured on.
    """

    valid_loss: float | None = None
    """where the loss is followed"""
    step: int | None = None
    since: int = 0
    rows: int | None = None
    held_out: str | None = None
    metric: str = VALID_LOSS
    """what is followed: a field of metrics.jsonl"""
    score: float | None = None
    """where another metric is followed"""
    higher_is_better: bool = False

    @property
    def value(self) -> float | None:
        """The best so far of what is followed; None before the first."""
        return self.valid_loss if self.metric == VALID_LOSS else self.score

    def update(self, value: float | None, step: int) -> bool:
        """Take in a validation; whether it is a new best. None, of a metric that has no value, is not."""
        best = self.value
        worse = best is not None and value is not None and (value <= best if self.higher_is_better else value >= best)
        if value is None or worse:
            self.since += 1
            return False
        if self.metric == VALID_LOSS:
            self.valid_loss = value
        else:
            self.score = value
        self.step, self.since = step, 0
        return True

    def exhausted(self, patience: int | None) -> bool:
        """Whether `patience` validations in a row brought no new best."""
        return patience is not None and self.since >= patience

    def gave_up(self, patience: int | None) -> str:
        """Why a run ends that is exhausted, in words."""
        if self.metric == VALID_LOSS:
            without = f"a loss below the {self.valid_loss:.4f} of step {self.step}"
        elif self.value is None:
            without = f"a value of {self.metric}"
        else:
            where = "above" if self.higher_is_better else "below"
            without = f"{self.metric} {where} the {self.value:.4f} of step {self.step}"
        return f"{self.since} validations (eval.patience={patience}) without {without}"

    def state(self) -> dict[str, Any]:
        """For a checkpoint; where the loss is followed as before there was anything else."""
        found = asdict(self)
        if self.metric == VALID_LOSS:
            for key in ("metric", "score", "higher_is_better"):
                del found[key]
        return found

    def on(
        self, measured: Measured, metric: str = VALID_LOSS, higher_is_better: bool = False
    ) -> tuple["Best", list[str]]:
        """This, as far as it holds for what is followed now: what was measured on other rows says nothing of them. And
        lines that say so.
        """
        fresh = Best(
            rows=measured.n_rows, held_out=measured.fingerprint, metric=metric, higher_is_better=higher_is_better
        )
        same = (self.metric, self.higher_is_better) == (metric, higher_is_better)
        if same and self.held_out == measured.fingerprint:
            return self, []
        if self.held_out is None and self.value is None:
            return fresh, []
        if self.metric != metric:
            why = f"eval.best {self.metric} -> {metric}"
        elif self.higher_is_better != higher_is_better:
            why = f"the {'highest' if higher_is_better else 'lowest'} {metric} is the best now (eval.best_mode)"
        elif self.held_out is None:
            why = f"the checkpoint does not say which held-out rows its validations read; now {measured.described()}"
        else:
            why = f"a validation reads other rows now: {self.rows:,} rows -> {measured.described()}"
        if self.value is None:
            return fresh, [f"changed: {why}"]
        what = "validation loss" if self.metric == VALID_LOSS else self.metric
        gone = f"the best {what} so far, {self.value:.4f} of step {self.step}, counts no more"
        return fresh, [f"changed: {why}; {gone}"]


def best_on(followed: Followed | None, state: dict[str, Any]) -> tuple[Best, list[str]]:
    """A checkpoint's best validation, if it counts for what is followed now, and lines where it does not."""
    best = Best(**state)
    return (best, []) if followed is None else best.on(followed.on, followed.metric, followed.higher_is_better)
