"""What a sweep is asked for, and the runs that it is made of."""

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from llm.cli import Repeated, bind, split, taken_out, with_values
from llm.errors import UserError
from llm.jobs.finetune import Finetune
from llm.jobs.pretrain import Pretrain
from llm.paths import PathText, refuse_unwritable
from llm.train.config.flags import parse_run_flags
from llm.train.config.outputs import higher_is_better

JOBS: dict[str, type[Pretrain]] = {"pretrain": Pretrain, "finetune": Finetune}
ROOT = Path(__file__).resolve().parents[1]
BRACKETS = {"[": 1, "{": 1, "(": 1, "]": -1, "}": -1, ")": -1}
LONGEST_NAME = 200
"""Characters of a folder's name; file systems allow 255 bytes."""


@dataclass(frozen=True)
class Settings:
    """Train a run for every combination of values, and compare them.

    config: run config
    output: folder of the sweep, which the same command goes on with
    sweep: KEY=VALUE,VALUE of the run config; given once for each key. Commas within brackets do not part values
    metric: a field of metrics.jsonl, by whose best value the table is sorted
    mode: whether the lowest (min) or highest (max) of it is the best; default: what its name says
    nproc: processes of each run; by default one, without a launcher
    launch: pretrain or finetune
    """

    config: str
    output: PathText
    sweep: Repeated = ()
    metric: str = "valid_loss"
    mode: Literal["min", "max"] | None = None
    nproc: int | None = None
    launch: Literal["pretrain", "finetune"] = "pretrain"

    @property
    def rises(self) -> bool:
        """Whether the highest value of the metric is the best. UserError where that is not known."""
        known = higher_is_better(f"_{self.metric}") if self.mode is None else self.mode == "max"
        if known is None:
            raise UserError(f"--metric={self.metric}: whether it is to rise or to fall is not known; give --mode")
        return known


@dataclass(frozen=True)
class Trial:
    """One run of a sweep."""

    values: dict[str, str]
    """Of the swept keys, as they were typed."""
    folder: Path
    config: dict[str, Any]
    """All keys of its config, dotted."""
    command: list[str]

    @property
    def name(self) -> str:
        return self.folder.name


def parse(words: Sequence[str]) -> tuple[Settings, list[str]]:
    """The sweep's own flags, and the words that all its runs have in common. UserError naming the flag."""
    repeated, once = taken_out(with_values(words, Settings), Settings)
    values, flags = split(once)
    if values:
        raise UserError(f"unexpected word {values[0]!r}; every option is --key=value")
    own = {key: text for key, text in flags.items() if key in Settings.__dataclass_fields__}
    rest = {key: text for key, text in flags.items() if key not in own}
    for key in ("run_dir", "replay_step", "dry_run", "show"):
        if key in rest:
            raise UserError(f"--{key} does not go with a sweep, which makes many runs in folders of its own")
    settings = Settings(**{**bind(Settings, [], own), **repeated})
    if settings.nproc is not None and settings.nproc < 1:
        raise UserError(f"--nproc={settings.nproc}: expected a number of processes, 1 or more")
    if not settings.sweep:
        raise UserError("--sweep KEY=VALUE,VALUE is missing: which values of which key to try")
    given = [f"--{key}" if text is None else f"--{key}={text}" for key, text in rest.items()]
    common = [f"--config={settings.config}", *given]
    parse_run_flags(common)
    return settings, common


def trials_of(settings: Settings, common: Sequence[str]) -> list[Trial]:
    """A run for each combination, the values of the last key changing fastest. UserError naming the combination that
    makes no run."""
    swept: dict[str, list[str]] = {}
    given = parse_run_flags([*common]).overrides
    for text in settings.sweep:
        key, equals, listed = text.partition("=")
        if not equals or not listed:
            raise UserError(f"--sweep={text}: expected KEY=VALUE,VALUE")
        if key in swept or key in given:
            raise UserError(f"--sweep={text}: {key} is given twice")
        swept[key] = values = apart(listed)
        doubled = next((value for value in values if values.count(value) > 1), None)
        if doubled is not None or "" in values:
            what = "is empty" if doubled is None else f"{doubled!r} is there twice"
            raise UserError(f"--sweep={text}: a value {what}")
    folder = Path(settings.output)
    refuse_unwritable(folder.absolute(), f"--output={settings.output}")
    _ = settings.rises  # refused now, where it is not known
    trials = [
        _trial(settings, common, dict(zip(swept, values, strict=True)), folder)
        for values in itertools.product(*swept.values())
    ]
    names = [trial.name for trial in trials]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--sweep: two combinations have the folder {name}; their values differ in / alone")
    return trials


def apart(text: str) -> list[str]:
    """The values of a list, whose own commas stand within brackets."""
    found, depth = [""], 0
    for letter in text:
        depth += BRACKETS.get(letter, 0)
        if letter == "," and depth == 0:
            found.append("")
        else:
            found[-1] += letter
    return [value.strip() for value in found]


def _trial(settings: Settings, common: Sequence[str], values: dict[str, str], folder: Path) -> Trial:
    name = ",".join(f"{key}={value}" for key, value in values.items()).replace("/", "_")
    if len(name.encode()) > LONGEST_NAME:
        raise UserError(f"{name}: is too long for the name of a folder; sweep fewer keys at a time")
    kind = JOBS[settings.launch]
    words = [*common, f"--run_dir={folder / name}"]
    words += [f"--nproc={settings.nproc}"] if settings.nproc is not None else []
    words += [f"--{key}={value}" for key, value in values.items()]
    try:
        job = kind.parse(words)
    except (UserError, ValidationError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise UserError(f"{name}: {reason}") from None
    return Trial(
        values, folder / name, dict(_dotted(job.config.model_dump(mode="json"))),
        [sys.executable, str(ROOT / kind.script), *words],
    )  # fmt: skip


def _dotted(section: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in section.items():
        found += _dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return found
