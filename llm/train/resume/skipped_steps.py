"""The rows that a run passes over because `train.skip_steps`, or an older version's checkpoint, names their steps."""

from typing import Any

from llm.data.ranges import Range
from llm.train.config import TrainConfig
from llm.train.schedule import rows_of_step


def guard_state(meta: dict[str, Any], step: int) -> dict[str, Any]:
    """The guard's state of the checkpoint of `step`. One from before rows were kept names steps: those that lie ahead
    become the rows that they would have had.
    """
    state = meta["guard"]
    if "rows_passed_over" in state:
        return dict(state)
    ahead = [number for number in state["passed_over"] if number > step]
    return {**state, "rows_passed_over": [rows_ahead(meta, step, number) for number in ahead]}


def rows_ahead(meta: dict[str, Any], step: int, asked: int) -> Range:
    """The rows that step `asked` would have had by the plan of the checkpoint of `step`, in its data's order."""
    train, data = meta["config"]["train"], meta["data"]
    plan = TrainConfig(global_batch_size=train["global_batch_size"], batch_schedule=train.get("batch_schedule", ()))
    return _shifted(plan, step, data["consumed"], data.get("earlier_rows", 0), asked)


def _shifted(plan: TrainConfig, step: int, consumed: int, earlier: int, asked: int) -> Range:
    first, end = rows_of_step(plan, step, earlier + consumed, asked)
    return first - earlier, end - earlier


class SkippedSteps:
    """The rows that `train.skip_steps` means: those that each step would have had by the plan that was in force when it
    was first named. A batch of another size then passes over the same rows.
    """

    def __init__(self) -> None:
        self._rows: dict[int, Range] = {}

    @property
    def ranges(self) -> list[Range]:
        """All of them."""
        return list(self._rows.values())

    def settle(self, train: TrainConfig, step: int, consumed: int, earlier: int) -> None:
        """Look up the steps that are new in `train` and lie behind `step`; forget those that it names no more."""
        new = (number for number in train.skip_steps if number not in self._rows and number > step)
        found = {number: _shifted(train, step, consumed, earlier, number) for number in new}
        self._rows = {number: rows for number, rows in (self._rows | found).items() if number in train.skip_steps}

    def state(self) -> list[list[int]]:
        """For the checkpoint: step, first row, end row."""
        return [[step, *rows] for step, rows in sorted(self._rows.items())]

    def load(self, meta: dict[str, Any], step: int) -> None:
        """Take over those of the checkpoint of `step`; one from before rows were kept has its own plan for them."""
        kept = meta.get("skip_steps")
        if kept is None:
            steps = meta["config"]["train"].get("skip_steps", ())
            kept = [[number, *rows_ahead(meta, step, number)] for number in steps if number > step]
        self._rows = {number: (first, end) for number, first, end in kept}

    def missed(self, train: TrainConfig, step: int) -> list[str]:
        """A line where `train` names steps that were done before they were named."""
        late = [number for number in train.skip_steps if number <= step and number not in self._rows]
        if not late:
            return []
        return [f"note: train.skip_steps={late}: the run is at step {step}, and has trained on the rows of these"]

    def forget_data(self) -> None:
        """Begin with other data."""
        self._rows = {}
