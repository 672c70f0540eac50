"""The lowest validation loss of a run, and when a run has stopped getting better."""

from dataclasses import dataclass
from typing import Any

from llm.data.heldout import HeldOut


@dataclass
class Best:
    """The lowest validation loss (nats) so far, its step, and how many validations since were not lower; `rows` and
    `held_out` (a fingerprint) are the held-out rows that all of these were measured on.
    """

    valid_loss: float | None = None
    step: int | None = None
    since: int = 0
    rows: int | None = None
    held_out: str | None = None

    def update(self, valid_loss: float, step: int) -> bool:
        """Take in a validation; whether it is a new best."""
        if self.valid_loss is not None and valid_loss >= self.valid_loss:
            self.since += 1
            return False
        self.valid_loss, self.step, self.since = valid_loss, step, 0
        return True

    def exhausted(self, patience: int | None) -> bool:
        """Whether `patience` validations in a row brought no new best."""
        return patience is not None and self.since >= patience

    def on(self, held_out: HeldOut) -> tuple["Best", list[str]]:
        """This, as far as it holds for these held-out rows: what was measured on other rows says nothing of them. And
        lines that say so.
        """
        fresh = Best(rows=held_out.n_rows, held_out=held_out.fingerprint)
        if self.held_out == held_out.fingerprint:
            return self, []
        if self.held_out is None and self.valid_loss is None:
            return fresh, []
        if self.held_out is None:
            why = f"the checkpoint does not say which held-out rows its validations read; now {held_out.described()}"
        else:
            why = f"a validation reads other rows now: {self.rows:,} rows -> {held_out.described()}"
        if self.valid_loss is None:
            return fresh, [f"changed: {why}"]
        gone = f"the best validation loss so far, {self.valid_loss:.4f} of step {self.step}, counts no more"
        return fresh, [f"changed: {why}; {gone}"]


def best_on(held_out: HeldOut | None, state: dict[str, Any]) -> tuple[Best, list[str]]:
    """A checkpoint's best validation, if it counts for these held-out rows, and lines where it does not."""
    best = Best(**state)
    return (best, []) if held_out is None else best.on(held_out)
