"""What a kill campaign (tools/campaign.py) is to do: its flags, and the plan of its kills."""

import difflib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from llm.cli import bind, split
from llm.errors import UserError
from llm.paths import PathText, refuse_existing
from llm.train.config import RunConfig
from llm.train.config.flags import RunFlags, parse_run_flags
from tools.campaign_job import QUARTERS, Kill


class Place(NamedTuple):
    """Where a kill comes. `moment` says what of a run must come round for it."""

    moment: Literal["start", "load", "step", "save", "prune"]
    main_only: bool
    arrivals: int
    """The kill comes at one of so many."""
    what: str


PLACES = {
    "file": Place("save", False, QUARTERS, "while a rank's file grows"),
    "commit": Place("save", True, 1, "after the rename, before older checkpoints are pruned"),
    "optimizer": Place("step", False, 2, "before or after the optimizer's own step"),
    "last file": Place("save", False, 1, "all files are written, nothing is committed"),
    "forward": Place("step", False, 1, "before a forward, which its peers are in"),
    "backward": Place("step", False, 5, "in a backward"),
    "manifest": Place("save", True, 1, "the manifest is written, the folder not yet renamed"),
    "first step": Place("start", False, 1, "before the first step of an attempt"),
    "load": Place("load", False, 2, "while a checkpoint is read"),
    "pruning": Place("prune", True, 1, "within the removal of an old checkpoint"),
    "meeting": Place("start", False, 1, "before the ranks have met"),
    "build": Place("start", False, 1, "before model and engine are built"),
    "resumed": Place("start", False, 1, "when a checkpoint is loaded, or none was there"),
    "run folder": Place("start", True, 1, "config.yaml is written under its hidden name, not yet renamed"),
}
"""The most telling first: a campaign of few kills takes these."""


@dataclass(frozen=True)
class Settings:
    """Kill a run again and again, bring it back, and compare it bit by bit with the run that nobody touched.

    config: the run config
    nproc: processes of the run
    kills: SIGKILLs; from 14 on every place gets one
    interval: steps between checkpoints
    steps: steps of the run; default: enough for the kills
    restarts: what brings the run back: torchrun --max-restarts, the same command, or both in turns
    seed: of the plan
    out: file for the table
    keep_dir: new folder that keeps both runs; default: a temporary one, kept where something differs
    """

    config: str
    nproc: int
    kills: int = 30
    interval: int = 5
    steps: int | None = None
    restarts: Literal["torchrun", "command", "both"] = "both"
    seed: int = 0
    out: PathText | None = None
    keep_dir: PathText | None = None

    def check(self) -> None:
        """UserError naming the flag whose value is impossible."""
        if not Path("/proc/self/environ").exists():
            raise UserError("a campaign looks for processes in /proc, which this system has not")
        for name in ("nproc", "kills", "interval"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name}={getattr(self, name)}: expected 1 or more")
        devices = torch.cuda.device_count()
        if devices and self.nproc > devices:
            raise UserError(f"--nproc={self.nproc}: this machine has {devices} GPU(s), one for each process")
        if self.length() < 5 * self.interval:
            raise UserError(
                f"--steps={self.steps}: the kills need 5 checkpoints or more, --steps={5 * self.interval} with "
                f"--interval={self.interval}"
            )
        if self.out is not None and not Path(self.out).absolute().parent.is_dir():
            raise UserError(f"--out={self.out}: no such folder")
        if self.out is not None:
            refuse_existing(self.out, "--out")
        if self.keep_dir is not None and Path(self.keep_dir).exists():
            raise UserError(f"--keep_dir={self.keep_dir}: it is there already; give the name of a new folder")

    def length(self) -> int:
        """Steps of the run."""
        return self.interval * max(self.kills // 2 + 4, 6) if self.steps is None else self.steps


def parse(words: Sequence[str]) -> tuple[Settings, RunFlags]:
    """The campaign's own flags, and those of the run: config and overrides."""
    values, flags = split(words)
    if values:
        raise UserError(f"unexpected word {values[0]!r}; every option is --key=value")
    known = list(Settings.__dataclass_fields__)
    own = {key: text for key, text in flags.items() if key in known}
    rest = {key: text for key, text in flags.items() if key not in known}
    for key in rest:
        near = difflib.get_close_matches(key, known, n=1)
        if "." not in key and near:
            raise UserError(f"unknown flag --{key}; did you mean --{near[0]}?")
    settings = Settings(**bind(Settings, [], own))
    given = [f"--{key}" if text is None else f"--{key}={text}" for key, text in rest.items()]
    run = parse_run_flags([f"--config={settings.config}", *given])
    for key in ("run_dir", "replay_step", "dry_run"):
        if key in rest:
            raise UserError(f"--{key} does not go with a campaign, which makes two runs in folders of its own")
    for key, instead in (("train.steps", "steps"), ("checkpoint.interval", "interval")):
        if key in rest:
            raise UserError(f"--{key}: in a campaign this is --{instead}")
    return settings, run


def overrides(settings: Settings, flags: RunFlags) -> dict[str, Any]:
    """What the campaign's runs have other than the config: length and rhythm, and nothing that ends them early, sends
    curves away, traces or begins elsewhere.
    """
    return flags.overrides | {
        "train.steps": settings.length(),
        "train.epochs": None,
        "checkpoint.interval": settings.interval,
        "checkpoint.resume": "auto",
        "eval.patience": None,
        "log.trace_steps": None,
        "log.wandb": False,
    }


def plan(settings: Settings, config: RunConfig) -> list[Kill]:
    """The kills in the order of the run, drawn from the seed: every place once, the rest where most steps are lost."""
    draw, n, interval = random.Random(settings.seed), settings.kills, settings.interval
    saves, keep = settings.length() // interval, config.checkpoint.keep
    first_prune = keep + 1 + config.checkpoint.keep_best
    prunes = config.checkpoint.keep_every != interval and first_prune <= saves - 3
    possible = [name for name, place in PLACES.items() if prunes or place.moment != "prune"]
    telling = [name for name in possible if PLACES[name].moment in ("step", "save") and name != "commit"]
    names = possible[:n] + [telling[i % len(telling)] for i in range(n - len(possible))]
    draw.shuffle(names)
    restarts = {"both": ["torchrun", "command"]}.get(settings.restarts, [settings.restarts])
    kills: list[Kill] = []
    ranks = draw.sample(range(settings.nproc), settings.nproc)
    saved, n_free, n_commands = 0, 0, 0
    for i in range(n):
        ready = next(name for name in names if name != "load" or saved > 0)  # when a checkpoint is certain
        name = "forward" if i == 0 and "forward" in names else ready  # within the first steps
        names.remove(name)
        place, after = PLACES[name], 1 + i * (saves - 4) // n  # intervals done
        rank = 0
        if not place.main_only:
            rank, n_free = ranks[n_free % settings.nproc], n_free + 1
        step = 0
        if place.moment == "step":
            step = min(2, interval) if i == 0 else (after + 1) * interval - draw.randrange(min(2, interval))
            saved = max(saved, step - 1 - 2 * interval)
        elif place.moment == "save":
            step = (after + 1) * interval
            saved = max(saved, step - interval)
        elif place.moment == "prune":
            step = max(after + 1, first_prune) * interval
            saved = step
        restart = restarts[i % len(restarts)]
        who = "rank"
        if restart == "command":
            who, n_commands = ("all", "rank", "launcher")[n_commands % 3], n_commands + 1
        kills.append(Kill(name, rank, step, 1 + draw.randrange(place.arrivals), who, restart))
    return kills
