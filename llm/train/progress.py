"""Where a run stands: what its checkpoints record beside weights and optimizer state."""

from dataclasses import dataclass, field
from typing import Any

from llm.checkpoint.frozen import Origin
from llm.train.best import Best, Followed, best_on
from llm.train.config import GuardConfig
from llm.train.guard import Guard
from llm.train.resume.skipped_steps import SkippedSteps


@dataclass
class Progress:
    """The place of a run; a new one stands before its first step. Equal on all ranks."""

    guard: Guard
    best: Best
    skipped: SkippedSteps = field(default_factory=SkippedSteps)
    step: int = 0
    saved_step: int = 0
    """Step of the newest checkpoint; 0: the initial weights need none."""
    consumed_rows: int = 0
    """Rows of the present data that were read."""
    earlier_rows: int = 0
    """Rows that were read of other data, before a checkpoint was continued on the present one."""
    tokens: int = 0
    origin: Origin | None = None
    """Where the values of frozen parameters came from; None where all parameters train."""

    reference: str | None = None
    """Digest of the reference sums that the run trains against; None where it does not."""

    @classmethod
    def new(cls, config: GuardConfig, followed: Followed | None) -> "Progress":
        """Before the first step."""
        best, _ = best_on(followed, {})
        return cls(Guard(config), best)

    @property
    def rows(self) -> int:
        """All rows that were read."""
        return self.earlier_rows + self.consumed_rows

    def state(self) -> dict[str, Any]:
        """For the checkpoint; the rows stand there with their data."""
        return {
            "tokens": self.tokens,
            "best": self.best.state(),
            "guard": self.guard.state(),
            "skip_steps": self.skipped.state(),
            **({} if self.reference is None else {"reference": self.reference}),
        }

    def count_rows_anew(self) -> None:
        """Begin with other data."""
        self.earlier_rows += self.consumed_rows
        self.consumed_rows = 0
        self.guard.forget_data()
        self.skipped.forget_data()
