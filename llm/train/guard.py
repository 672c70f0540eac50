"""What happens when a step goes wrong: a loss or gradient that is no finite number, or a loss far above the last ones.

The engine has already left weights and optimizer state as they were (llm/parallel/engine/engine.py); here it is decided
whether the run stops, goes on behind that step, or goes back to its last checkpoint and then passes over its rows.

Rows, not steps: the batch may have another size when they come round again. And a loss is compared with those of steps
of the same size only, as a smaller batch or a shorter sequence has another spread and another level.
"""

import statistics
from collections import deque
from typing import Any, Literal

from llm.data.batch import StepBatch
from llm.data.ranges import Range, described, merged
from llm.parallel.collectives import agreed_error
from llm.parallel.engine.step import StepResult
from llm.train.config import GuardConfig

Action = Literal["go on", "rewind"]
SIGMA_OF_MAD = 1.4826  # of a normal distribution, in median absolute deviations
SMALLEST_SIGMA = 0.005  # of the median: losses that hardly vary make no spike out of nothing


def rows_and_size(batch: StepBatch) -> tuple[Range, tuple[int, int]]:
    """A step's global rows, and how many they are and of how many tokens a sequence is."""
    return (batch.first_row, batch.first_row + batch.n_rows), (batch.n_rows, batch.micro_batches[0].seq_len)


def part_passed_over(step: int, batch: StepBatch) -> list[str]:
    """A line where some rows of the step, but not all, were passed over."""
    if not batch.passed_over or batch.is_passed_over:
        return []
    return [f"step {step}: passed over {described(batch.passed_over)}; an update from its other rows"]


class Guard:
    """The policy of a run and what it remembers; equal on all ranks, because every loss is global."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.passed_over: list[Range] = []
        """Rows that brought the run back to a checkpoint; from now on they are not trained on."""
        self.events = 0
        self._losses: deque[float] = deque(maxlen=config.spike_window)
        self._size: tuple[int, int] | None = None

    def loss_limit(self, size: tuple[int, int]) -> float | None:
        """Loss above which the engine is to leave the weights alone, in a step of `size`: rows, and tokens of a
        sequence. None where no limit applies.
        """
        return self._limit(size) if self.config.spike in ("skip", "rewind") else None

    def _limit(self, size: tuple[int, int]) -> float | None:
        if self._size is not None and self._size != size:
            self._losses.clear()
        self._size = size
        if self.config.spike == "off" or len(self._losses) < self.config.spike_window:
            return None
        median = statistics.median(self._losses)
        spread = SIGMA_OF_MAD * statistics.median(abs(loss - median) for loss in self._losses)
        return median + self.config.spike_threshold * max(spread, SMALLEST_SIGMA * abs(median))

    def judge(
        self, step: int, result: StepResult, rows: Range, size: tuple[int, int]
    ) -> tuple[Action, list[str]]:
        """What to do after step `step` of these rows and this size, and lines to say about it. UserError on all ranks
        where the policy is to stop, or there were too many such steps.
        """
        limit = self._limit(size)
        if result.skipped == "overflow":
            return "go on", [f"step {step}: fp16 overflow; no update, loss scale now {result.loss_scale:g}"]
        if result.skipped == "passed over":
            return "go on", [f"step {step}: passed over ({described([rows])}), no update"]
        if result.skipped in ("loss", "gradient"):
            what = f"the loss is {result.loss}" if result.skipped == "loss" else "the gradient is not finite"
            if result.skipped == "gradient" and result.loss_scale is not None:
                what += f", for all that fp16's loss scale fell to {result.loss_scale:g}"
            text = f"step {step}: {what} ({'; '.join(result.culprits)})"
            if self.config.nonfinite == "raise":
                raise agreed_error(f"{text}; guard.nonfinite=raise: weights and the last checkpoint are intact")
            return self._event(self.config.nonfinite, rows, text)
        if limit is not None and result.loss > limit:
            text = f"step {step}: loss {result.loss:.4f} is above {limit:.4f}, guard.spike_threshold over the last ones"
            if result.skipped == "limit":
                return self._event(self.config.spike, rows, text)
            self._losses.append(result.loss)
            return "go on", [f"{text}; guard.spike=warn"]
        self._losses.append(result.loss)
        return "go on", []

    def _event(self, policy: str, rows: Range, text: str) -> tuple[Action, list[str]]:
        self.events += 1
        if self.events > self.config.max_events:
            raise agreed_error(f"{text}; more than guard.max_events={self.config.max_events} such steps in this run")
        if policy == "skip":
            return "go on", [f"{text}; no update"]
        self.passed_over = merged([*self.passed_over, rows])
        return "rewind", [f"{text}; going back to the last checkpoint, to pass over {described([rows])}"]

    def forget_data(self) -> None:
        """Begin with other data: its rows are others, and its losses have another level."""
        self.passed_over = []
        self._losses.clear()

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {
            "rows_passed_over": [list(rows) for rows in self.passed_over],
            "events": self.events,
            "losses": list(self._losses),
            "size": None if self._size is None else list(self._size),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over a checkpoint's state. What led back to it is not forgotten."""
        self.passed_over = merged([*self.passed_over, *state["rows_passed_over"]])
        self.events = max(self.events, state["events"])
        self._losses.clear()
        self._losses.extend(state["losses"])
        size = state.get("size")
        self._size = None if size is None else (size[0], size[1])
