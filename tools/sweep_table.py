"""What came of the runs of a sweep, as a table, the best one first."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tools.sweep_plan import Trial


@dataclass(frozen=True)
class Outcome:
    """Of one run."""

    values: Mapping[str, str]
    """Of the swept keys."""
    best: float | None
    """Of the metric; None where the run has none."""
    best_step: int | None
    last: float | None
    steps: int
    """That it has trained."""
    failed: str | None
    """Why; None where it has ended."""
    metrics: tuple[str, ...] = ()
    """Fields with numbers that it has."""

    def said(self, metric: str) -> str:
        """In words."""
        if self.failed is not None:
            return f"failed: {self.failed}"
        return f"no {metric}" if self.best is None else f"{metric} {self.best:.6g} at step {self.best_step}"


def outcome_of(
    trial: Trial, rows: Sequence[Mapping[str, Any]], metric: str, rises: bool, failed: str | None
) -> Outcome:
    """Of the rows of metrics.jsonl. rises: whether the highest value of the metric is the best."""
    known = [(float(row[metric]), int(row["step"])) for row in rows if _is_number(row.get(metric))]
    best, step = (max if rises else min)(known, key=lambda one: one[0], default=(None, None))
    return Outcome(
        values=trial.values,
        best=best,
        best_step=step,
        last=known[-1][0] if known else None,
        steps=max((int(row["step"]) for row in rows), default=0),
        failed=failed,
        metrics=tuple(dict.fromkeys(key for row in rows for key, value in row.items() if _is_number(value))),
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def ranked(outcomes: Sequence[Outcome], rises: bool) -> list[Outcome]:
    """The best first; those that failed or have no number of the metric last, in their order."""

    def place(outcome: Outcome) -> tuple[bool, float]:
        if outcome.failed is not None or outcome.best is None:
            return True, 0.0
        return False, -outcome.best if rises else outcome.best

    return sorted(outcomes, key=place)


def _columns(outcomes: Sequence[Outcome], metric: str) -> list[str]:
    return [*outcomes[0].values, metric, "at step", f"last {metric}", "steps", "run"]


def _cells(outcome: Outcome, digits: str) -> list[str]:
    numbers = ["" if value is None else format(value, digits) for value in (outcome.best, outcome.last)]
    step = "" if outcome.best_step is None else str(outcome.best_step)
    state = "ended" if outcome.failed is None else f"failed: {outcome.failed}"
    return [*outcome.values.values(), numbers[0], step, numbers[1], str(outcome.steps), state]


def as_markdown(outcomes: Sequence[Outcome], metric: str) -> str:
    """A table to read."""
    columns = _columns(outcomes, metric)
    lines = [columns, ["---"] * len(columns), *(_cells(outcome, ".6g") for outcome in outcomes)]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def as_csv(outcomes: Sequence[Outcome], metric: str) -> str:
    """The same for other programs, every digit of the numbers."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_columns(outcomes, metric))
    writer.writerows(_cells(outcome, ".17g") for outcome in outcomes)
    return text.getvalue()
