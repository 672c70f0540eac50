"""Which layouts tools/layouts.py compares, and with which configs."""

import difflib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from llm.cli import bind, split, with_values
from llm.errors import UserError
from llm.parallel.layout import Layout
from llm.parallel.validate import divisors
from llm.paths import PathText, refuse_existing
from llm.train.config import RunConfig, check_layout, validate
from llm.train.config.flags import RunFlags, parse_run_flags

Precision = Literal["fp32", "bf16"]
INSTEAD = {
    "train.steps": "this is --steps",
    "train.seed": "this is --seed",
    "train.precision": "this is --precision",
    "parallel.zero_stage": "this is --zero",
    "parallel.tensor": "every value that fits is tried",
    "parallel.pipeline": "every value that fits is tried",
    "parallel.expert": "every value that fits is tried",
}
"""Keys of a run config that a comparison of layouts has values of its own for."""
OF_A_RUN = ("run_dir", "replay_step", "dry_run", "show")


@dataclass(frozen=True)
class Settings:
    """Compare every layout of a run config with one process.

    config: the run config
    nproc: numbers of processes whose layouts are tried, such as 4 or 1,2,4
    steps: optimizer steps, at the peak learning rate
    shrink: make the model small first, with every kind of layer and the same layouts
    zero: ZeRO stages to try; default 1,2,3
    precision: arithmetic of the layouts; the one process always has float32
    seed: train.seed, if not the config's
    json: file for the table with every step's numbers
    """

    config: PathText
    nproc: list[int]
    steps: int = 5
    shrink: bool = False
    zero: list[int] | None = None
    precision: Precision = "fp32"
    seed: int | None = None
    json: PathText | None = None

    @property
    def stages(self) -> list[int]:
        """The ZeRO stages to try."""
        return [1, 2, 3] if self.zero is None else self.zero


def parse(words: Sequence[str]) -> tuple[Settings, RunFlags]:
    """The comparison's own flags, and those of the run: config and overrides. UserError naming the flag."""
    values, flags = split(with_values(words, Settings))
    own = {key: text for key, text in flags.items() if key in Settings.__dataclass_fields__}
    rest = {key: text for key, text in flags.items() if key not in own}
    for key in rest:
        near = difflib.get_close_matches(key, Settings.__dataclass_fields__, n=1)
        if "." not in key and key not in RunConfig.model_fields and near:
            raise UserError(f"unknown flag --{key}; did you mean --{near[0]}?")
        if key in OF_A_RUN:
            raise UserError(f"--{key} does not go with a comparison of layouts, which keeps no run")
        if key in INSTEAD:
            raise UserError(f"--{key}: in a comparison of layouts {INSTEAD[key]}")
    settings = Settings(**bind(Settings, values, own))
    given = [f"--{key}" if text is None else f"--{key}={text}" for key, text in rest.items()]
    return settings, parse_run_flags([f"--config={settings.config}", *given])


class Candidate(NamedTuple):
    """A layout that fits, and the config that asks for it."""

    layout: Layout
    config: RunConfig


def check_flags(settings: Settings) -> None:
    """UserError naming the flag whose value is impossible."""
    nproc, steps, stages, json = settings.nproc, settings.steps, settings.stages, settings.json
    if not nproc or min(nproc) < 1:
        raise UserError(f"--nproc={','.join(map(str, nproc))}: expected numbers of processes from 1 up")
    devices = torch.cuda.device_count()
    if devices and max(nproc) > devices:
        raise UserError(f"--nproc={max(nproc)}: this machine has {devices} GPU(s), one for each process")
    if steps < 1:
        raise UserError(f"--steps={steps}: expected 1 or more")
    if not stages or not set(stages) <= {0, 1, 2, 3}:
        raise UserError(f"--zero={','.join(map(str, stages))}: possible are 0, 1, 2 and 3")
    if json is not None and not Path(json).absolute().parent.is_dir():
        raise UserError(f"--json={json}: no such folder")
    if json is not None:
        refuse_existing(json, "--json")


def prepared(config: RunConfig, precision: Precision, seed: int | None) -> RunConfig:
    """The config with this arithmetic and seed, and without what belongs to the rest of a run."""
    raw = config.model_dump(mode="json")
    raw["data"]["valid"] = raw["eval"]["patience"] = raw["log"]["trace_steps"] = None
    raw["log"]["wandb"] = False
    raw["train"] |= {"precision": precision} | ({} if seed is None else {"seed": seed})
    return validate(raw, "config")


def changed(config: RunConfig, parallel: dict[str, Any], train: dict[str, Any]) -> RunConfig:
    """The config with other values in these two sections."""
    raw = config.model_dump(mode="json")
    raw["parallel"] |= parallel
    raw["train"] |= train
    return validate(raw, "config")


def fitting(config: RunConfig, ranks: int, stages: Sequence[int]) -> Iterator[Candidate]:
    """Every layout on so many ranks that the run config's validator accepts, each with the largest micro-batch that
    does not exceed the config's.
    """
    sizes = micro_batch_sizes(config)
    for tensor in divisors(ranks):
        for pipeline in divisors(ranks // tensor):
            for expert in divisors(ranks // tensor // pipeline):
                for stage in stages:
                    parallel: dict[str, Any] = {"tensor": tensor, "pipeline": pipeline}
                    parallel |= {"expert": expert, "zero_stage": stage}
                    if pipeline == 1:
                        parallel["pipeline_schedule"] = "1f1b"  # there is none
                    for micro in sizes:
                        cut = changed(config, parallel, {"micro_batch_size": micro})
                        try:
                            yield Candidate(check_layout(cut, ranks), cut)
                            break
                        except UserError:
                            continue


def alone(config: RunConfig) -> RunConfig:
    """The config for one process in float32 with nothing cut, compiled or moved."""
    cut: dict[str, Any] = {"tensor": 1, "pipeline": 1, "pipeline_schedule": "1f1b", "expert": 1}
    cut |= {"zero_stage": 1, "offload_optimizer": False}
    micro = micro_batch_sizes(config)[0]
    return changed(config, cut, {"precision": "fp32", "compile": False, "micro_batch_size": micro})


def micro_batch_sizes(config: RunConfig) -> list[int]:
    """Those that one process can have, up to the config's, the largest first."""
    train = config.train
    every = math.gcd(train.global_batch_size, *(size for _, size in train.batch_schedule))
    return [size for size in reversed(divisors(every)) if size <= train.micro_batch_size]
