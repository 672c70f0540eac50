"""Runs from Python, for a script or a notebook: the commands' train and evaluate as functions.

    from llm.runs import evaluate, metrics, train

    run = train({"model": {...}, "data": {...}, "train": {"steps": 100}}, "runs/mine")
    losses = [row["loss"] for row in metrics(run)]
    model = LLM.from_pretrained(run)

Configs, run folders and refusals are those of the commands, so that either goes on with what the other began. They work
in this process, which sees what was registered in it (mixers, tasks, kinds of data); started by torchrun, in all of its
processes, each of which must call them alike. DeepSpeed stays loaded, and the process group stands, until the process
ends. What must be mended is a UserError.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from llm import environment, shipped
from llm.errors import UserError
from llm.evaluate.outputs import Output
from llm.generation.device import Dtype
from llm.parallel.launch import process
from llm.train.config import RunConfig, check_layout, config_of, load_config
from llm.train.preflight import preflight


def train(
    config: Mapping[str, Any] | str | Path,
    run_dir: str | Path,
    *,
    overrides: Mapping[str, Any] | None = None,
    nproc: int | None = None,
) -> Path:
    """Train to the config's last step, or go on with what the folder holds; return the run's folder, which
    `LLM.from_pretrained` reads.

    config: a YAML file, the name of one that ships (`quickstart`), or what would stand in one, as nested dicts.
    overrides: keys of it, as {"train.steps": 200}.
    nproc: start that many processes on this machine, and wait for them; what they are to know beyond Lattice stands in
    files under `extensions`, as they are new ones. None: train here.

    Signals are obeyed as by the command, Ctrl-C too: the run saves, and ends by SystemExit. UserError where there is no
    such run, or the processes that were started have failed, whose last line on the screen says why.
    """
    folder = Path(run_dir).expanduser()
    found = _config(config, dict(overrides or {}))
    place = environment.place()
    check_layout(found, nproc or place.size)
    if nproc is not None:
        _train_elsewhere(found, folder, nproc, place.size)
        return folder
    if place.rank == 0:
        preflight(found, folder)
    process.quiet_libraries()
    world = process.joined(found.parallel.timeout_s, found.train.threads)
    from llm.train.trainer import Trainer  # its imports take seconds, so a wrong config is reported first

    Trainer(found, folder, world).fit()
    return folder


def _config(config: Mapping[str, Any] | str | Path, overrides: dict[str, Any]) -> RunConfig:
    if isinstance(config, Mapping):
        return config_of(dict(config), "the config", overrides)
    return load_config(config, overrides)


def _train_elsewhere(config: RunConfig, folder: Path, nproc: int, size: int) -> None:
    if nproc < 1 or size > 1:
        among = f"this is one of {size} processes already" if size > 1 else "must be at least 1"
        raise UserError(f"nproc={nproc}: {among}")
    paths = os.pathsep.join([str(shipped.PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "config.yaml"
        file.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)), encoding="utf-8")
        words = [sys.executable, str(shipped.root() / "launch/pretrain.py"), "--config", str(file)]
        words += ["--run_dir", str(folder), "--nproc", str(nproc)]
        done = subprocess.run(words, env={**environment.alone(), "PYTHONPATH": paths})
    if done.returncode:
        raise UserError(f"{folder}: {nproc} processes ended with status {done.returncode}; the lines above say why")


def metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """What a run has reported, a row for each step: `step`, `loss`, `lr`, after a validation `valid_loss` and more.

    UserError where the folder has no metrics, or a line of them is damaged; a last line that a kill cut off is left
    out.
    """
    file = Path(run_dir).expanduser() / "metrics.jsonl"
    if not file.is_file():
        raise UserError(f"{file}: no such file; is {run_dir} a run folder that has made a step?")
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n")[:-1], 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{file}, line {number}: no JSON: {error}") from None
    return rows


def evaluate(
    model: str | Path,
    tasks: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_tokens: int = 16384,
    dtype: Dtype = "auto",
    average: bool = False,
    chat_template: str | None = None,
    data_dir: Sequence[str | Path] = (),
    image_root: str | Path | None = None,
    threads: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Ask a model tasks and return the results of each by name: metrics, standard errors (`acc_stderr`), `n`. In
    `output` lie results.json, samples, a report; the same call goes on where one was killed.

    model: whatever a path to one can be. tasks: paths of YAML files, or names of those in configs/evaluate.
    chat_template: ask as a user asks, by this template (`auto`: the model's own); None: plain prompts. The rest is as
    of launch/evaluate.py, whose data ranks share the documents; so do those of torchrun here.
    """
    from llm.evaluate.evaluation import evaluate as evaluate_all
    from llm.jobs.evaluate import Evaluate, read_flags
    from llm.parallel.grid import make_grid
    from llm.parallel.layout import Layout

    names = [tasks] if isinstance(tasks, str | Path) else list(tasks)
    flags = read_flags(
        str(Path(model).expanduser()),
        str(Path(output).expanduser()),
        tuple(map(str, names)),
        limit=limit,
        num_fewshot=num_fewshot,
        batch_tokens=batch_tokens,
        dtype=dtype,
        average=average,
        apply_chat_template=chat_template is not None,
        chat_template=chat_template or "auto",
        data_dir=tuple(map(str, data_dir)),
        image_root=None if image_root is None else str(image_root),
        threads=threads,
    )
    place = environment.place()
    job = Evaluate([], flags, Layout(place.size, 1, 1, 1, sequence_parallel=False))
    job.check(place.rank)
    process.quiet_libraries()
    world = process.joined(job.timeout_s, job.threads)
    evaluate_all(flags.settings, make_grid(world, job.layout))
    return {name: dict(found) for name, found in Output.read(flags.settings.output).results.items()}
