"""What a checkpoint and the run that continues it do not have in common: what is refused, what is said in a line, and
which rows are passed over.
"""

from collections.abc import Iterator
from typing import Any

from llm.data.mixture import Mixture
from llm.data.ranges import Range
from llm.train.config import OptimConfig, RunConfig, TrainConfig
from llm.train.differences import changes, is_among
from llm.train.schedule import learning_rate, rows_of_step

SAID = ("model", "optim", "train", "parallel")
"""Sections whose changes are said when a run goes on, one line each."""
NOT_SAID = (
    "model.init_from", "parallel.timeout_s",
    "train.steps", "train.epochs", "train.skip_steps",  # the line about the learning rate has the length
)  # fmt: skip

ALLOWED_BY = {"seed": "train.seed", "data.seq_len": "train.seq_len"}
"""The config key that allows this difference of the order of rows, besides `data`, which allows them all."""


def data_refused(mixture: Mixture, state: dict[str, Any], allowed: tuple[str, ...]) -> list[str]:
    """Lines about differences of the training data from a checkpoint's state that were not allowed."""
    found = mixture.changes(state).items()
    refused = [f"{key}: {words}" for key, words in found if not _is_allowed(key, allowed)]
    if not refused:
        return []
    return [
        f"the training data differs from the checkpoint's, so its rows cannot go on: {'; '.join(refused)} "
        f"(--checkpoint.allow_changes=[data] counts the rows of the new data from 0; "
        f"model.init_from begins a new run with the weights alone)"
    ]


def _is_allowed(key: str, allowed: tuple[str, ...]) -> bool:
    return "data" in allowed or (key in ALLOWED_BY and is_among(ALLOWED_BY[key], allowed))


def data_line(mixture: Mixture, state: dict[str, Any]) -> str | None:
    """What is said where the rows of the training data are counted from 0 again; None where they go on."""
    what = dict.fromkeys(_named(key) for key in mixture.changes(state))
    if not what:
        return None
    return (
        f"changed: the training data ({', '.join(what)}): its rows and epochs are counted from 0, after "
        f"{state['consumed']:,} rows of the data before"
    )


def _named(key: str) -> str:
    """A key of Mixture.changes in words."""
    if key.startswith("data.sources."):
        return f"source {key.removeprefix('data.sources.').rpartition('.')[0]}"
    return ALLOWED_BY.get(key, key)


def change_lines(meta: dict[str, Any], config: RunConfig, ranks: int, step: int) -> list[str]:
    """A line for each change of batch, layout, length or schedule since the checkpoint of `step`, old -> new. `meta` is
    the checkpoint's, `config` the resolved one of now.
    """
    return [*_changed_keys(meta, config, ranks), *_changed_rate(meta["config"], config, step)]


def _changed_keys(meta: dict[str, Any], config: RunConfig, ranks: int) -> Iterator[str]:
    before = (meta.get("layout") or {}).get("world", ranks)
    if before != ranks:
        yield f"changed: ranks {before} -> {ranks}"
    for key, (was, now) in changes(meta["config"], config.model_dump(mode="json")).items():
        if is_among(key, SAID) and not is_among(key, NOT_SAID):
            yield f"changed: {key} {_shown(was)} -> {_shown(now)}"


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _changed_rate(saved: dict[str, Any], config: RunConfig, step: int) -> Iterator[str]:
    """The learning rate of the next step, where length or schedule are others than they were."""
    steps, before = config.train.steps, saved["train"]["steps"]
    assert steps is not None
    optim = OptimConfig.model_validate({k: v for k, v in saved["optim"].items() if k in OptimConfig.model_fields})
    last, planned = (learning_rate(optim, before, at) for at in (step, step + 1))
    rate = learning_rate(config.optim, steps, step + 1)
    if step >= steps or (steps == before and rate == planned):
        return
    what = f"train.steps {before} -> {steps}" if steps != before else "the learning rate"
    was = f"; it would have been {planned:.2e}" if step < before and planned != rate else ""
    yield f"changed: {what}: learning rate {last:.2e} at step {step}, {rate:.2e} at step {step + 1}{was}"


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
