"""What a checkpoint and the run that continues it do not have in common, in words: what is refused,
and what is said when the run goes on.
"""

from collections.abc import Iterator
from typing import Any

from llm.data.mixture import Mixture
from llm.train.config import OptimConfig, RunConfig
from llm.train.resume.differences import changes, is_among
from llm.train.schedule import learning_rate

REPORTED = ("model", "optim", "train", "parallel")
"""Sections whose changes are reported when a run goes on, one line each."""
NOT_REPORTED = (
    "model.init_from", "model.lora", "parallel.timeout_s",
    "train.steps", "train.epochs", "train.skip_steps",  # the line about the learning rate has the length
)  # fmt: skip

ALLOWED_BY = {"seed": "train.seed", "data.seq_len": "train.seq_len"}
"""The config key that allows this difference of the order of rows, besides `data`, which allows them all."""


def refused_data_changes(mixture: Mixture, state: dict[str, Any], allowed: tuple[str, ...]) -> list[str]:
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


def data_note(mixture: Mixture, state: dict[str, Any]) -> str | None:
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


def change_notes(meta: dict[str, Any], config: RunConfig, ranks: int, step: int) -> list[str]:
    """A line for each change of batch, layout, length or schedule since the checkpoint of `step`, old -> new. `meta` is
    the checkpoint's, `config` the resolved one of now.
    """
    return [*_changed_keys(meta, config, ranks), *_changed_rate(meta["config"], config, step)]


def _changed_keys(meta: dict[str, Any], config: RunConfig, ranks: int) -> Iterator[str]:
    before = (meta.get("layout") or {}).get("world", ranks)
    if before != ranks:
        yield f"changed: ranks {before} -> {ranks}"
    for key, (was, now) in changes(meta["config"], config.model_dump(mode="json")).items():
        if is_among(key, REPORTED) and not is_among(key, NOT_REPORTED):
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
