"""A run for every combination of listed values, and a table of what came of them:

    python tools/sweep.py --config C --output DIR --sweep optim.lr=1e-3,3e-4 --sweep model.dim=64,128

Each run has a folder of DIR named by its values, with what it printed beside it. The same command again goes on: what
has ended is passed over, what was cut off continues. A run that fails is reported, and the others go on. DIR/table.md
and table.csv are written anew after each run, the best one first.

Any key of the run config can be given as in launch/pretrain.py (--section.key=value), for all runs. Exit status 0: all
runs have ended; 1: one has failed; 2: bad input, before any run has begun.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import llm.installed  # noqa: F401  (says in one line what is missing)

from llm.atomic import write_file
from llm.cli import HELP, describe, run_or_stop
from llm.errors import UserError
from tools.diff import read_rows
from tools.layouts import failure
from tools.sweep_plan import Settings, Trial, parse, trials_of
from tools.sweep_table import Outcome, as_csv, as_markdown, outcome_of, ranked

ENDED = "sweep.json"
"""In the folder of a run that has ended: the config that it had."""


def ended(trial: Trial) -> bool:
    """Whether a trial has ended in an earlier sweep. UserError where that one had another config."""
    path = trial.folder / ENDED
    if not path.is_file():
        return False
    had = json.loads(path.read_text(encoding="utf-8"))["config"]
    changed = [key for key in sorted({*had, *trial.config}) if had.get(key) != trial.config.get(key)]
    if changed:
        key = changed[0]
        raise UserError(
            f"{trial.folder}: has ended with another {key} ({had.get(key)}, and now {trial.config.get(key)}); give "
            f"another --output, or remove it"
        )
    return True


def run(trial: Trial) -> str | None:
    """Train a trial, or go on with it; why it failed, None where it has ended."""
    log = trial.folder.with_name(f"{trial.folder.name}.log")
    with log.open("wb") as file:
        process = subprocess.Popen(trial.command, stdout=file, stderr=subprocess.STDOUT)
        try:
            status = process.wait()
        except KeyboardInterrupt:  # of the whole group: the run saves what it has, and leaves
            process.wait()
            raise
    if status != 0:
        return f"{failure(log, status)} ({log})"
    write_file(trial.folder / ENDED, json.dumps({"config": trial.config}, indent=1).encode())
    return None


def sweep(settings: Settings, trials: Sequence[Trial]) -> list[Outcome]:
    """Run what has not ended, one after the other, and write the table after each."""
    folder = Path(settings.output)
    found: dict[str, Outcome] = {}
    before = {trial.name for trial in trials if ended(trial)}
    for number, trial in enumerate(trials, 1):
        began = time.monotonic()
        failed = None if trial.name in before else run(trial)
        metrics = trial.folder / "metrics.jsonl"
        notes: list[str] = []
        rows: list[dict[str, Any]] = read_rows(metrics, notes) if metrics.is_file() else []
        outcome = outcome_of(trial, rows, settings.metric, settings.rises, failed)
        found[trial.name] = outcome
        took = "had ended before" if trial.name in before else f"{time.monotonic() - began:.0f} s"
        print(f"[{number}/{len(trials)}] {trial.name}: {outcome.said(settings.metric)}; {took}", flush=True)
        for line in notes:
            print(f"note: {trial.name}: {line}", flush=True)
        best_first = ranked(list(found.values()), settings.rises)
        write_file(folder / "table.md", as_markdown(best_first, settings.metric).encode())
        write_file(folder / "table.csv", as_csv(best_first, settings.metric).encode())
    return ranked(list(found.values()), settings.rises)


def main(words: Sequence[str]) -> None:
    """Check every combination, then run them; SystemExit(1) where one failed."""
    if any(word in HELP for word in words):
        print(describe(Settings) + "\n  --section.key=value: any key of the run config, as in launch/pretrain.py")
        return
    settings, common = parse(words)
    trials = trials_of(settings, common)
    Path(settings.output).mkdir(parents=True, exist_ok=True)
    outcomes = sweep(settings, trials)
    print()
    print(as_markdown(outcomes, settings.metric), end="")
    failed = [outcome for outcome in outcomes if outcome.failed is not None]
    if failed:
        print(f"{len(failed)} of {len(outcomes)} runs failed", file=sys.stderr)
        raise SystemExit(1)
    if all(outcome.best is None for outcome in outcomes):
        known = sorted({key for outcome in outcomes for key in outcome.metrics})
        raise UserError(f"--metric={settings.metric}: no run has it; there are {', '.join(known)}")


if __name__ == "__main__":
    run_or_stop(lambda: main(sys.argv[1:]))
