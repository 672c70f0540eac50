"""HYDRA's commands: train, resume, list, debug.

    python -m llm.siblings.hydra train --model v1 --data FOLDER --tokenizer FOLDER
    python -m llm.siblings.hydra resume --checkpoint outputs/v1-baseline/checkpoint_epoch_5.pt --num_epochs 10

`torchrun --nproc_per_node N -m llm.siblings.hydra ...` trains on N processes.
"""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from llm.checkpoint.reader import Checkpoint, list_steps, newest_valid
from llm.cli import run_cli
from llm.errors import UserError
from llm.malloc import keep_freed
from llm.parallel.collectives import main_decides
from llm.parallel.launch import process
from llm.parallel.launch.world import World
from llm.paths import PathText
from llm.siblings.hydra_config import ModelType, TrainConfig, default_config, read_config
from llm.siblings.hydra_data import data_folder, tokenizer_of
from llm.siblings.hydra_model import create_model
from llm.siblings.hydra_train import EpochTrainer, epochs_done, raw_config, rows_at_once
from llm.tokenizer import load_tokenizer
from llm.train.config import RunConfig, check_layout
from llm.train.config.load import load_config, validate
from llm.train.preflight import preflight
from llm.train.stop import leave_before_first_step

WAIT_S = 600.0
"""Seconds that processes wait for each other before the run's config says how many."""
RULES = "=" * 60, "-" * 60


def train(
    model: str = "v1",
    config: PathText | None = None,
    data: PathText | None = None,
    tokenizer: PathText | None = None,
    output_dir: PathText | None = None,
    threads: int = 1,
    dry_run: bool = False,
) -> None:
    """Train a model; the same command again goes on with a run that was stopped.

    model: v1, v2, v3, or baseline, routed, hierarchical
    config: a YAML of the sections model, data, training and logging; default: the model's own
    data: a folder of train.jsonl and validation.jsonl with a column text, instead of data.dataset_name
    tokenizer: a file or folder, or bytes, instead of data.tokenizer_name
    output_dir: the run folder, instead of logging.output_dir
    threads: CPU threads of a process
    dry_run: print the run's config, and train nothing
    """
    kind = ModelType.named(model)
    said, notes = (default_config(kind), []) if config is None else read_config(config, kind)
    if output_dir is not None:
        said.output_dir = output_dir

    def made(ranks: int) -> tuple[dict[str, Any], list[str]]:
        return _run_of(said, kind, data, tokenizer, ranks, notes)

    if dry_run:
        raw, lines = made(1)
        print("".join(f"# {line}\n" for line in lines), end="")
        print(yaml.safe_dump(validate(raw, "hydra").model_dump(mode="json"), sort_keys=False), end="")
        return
    os.environ.setdefault("WANDB_PROJECT", said.project_name)
    os.environ.setdefault("WANDB_NAME", said.run_name)
    _fit(made, Path(said.output_dir), threads)


def _run_of(
    said: TrainConfig, kind: ModelType, data: str | None, tokenizer: str | None, ranks: int, notes: list[str]
) -> tuple[dict[str, Any], list[str]]:
    """The run config of a training, and lines on what was found out. UserError in one line where there is none."""
    folder, found = data_folder(said.dataset_name, said.dataset_config, data, Path(said.output_dir) / "data")
    chosen = tokenizer_of(said.tokenizer_name, tokenizer)
    size = load_tokenizer(chosen).vocab_size
    lines = [*notes, *found]
    if size > said.vocab_size:
        raise UserError(f"vocab_size={said.vocab_size} is below the tokenizer's {size} tokens")
    try:
        raw = raw_config(said, kind, folder, chosen, ranks)
    except ValueError as error:
        raise UserError(f"{error}") from None
    if said.use_wandb and importlib.util.find_spec("wandb") is None:
        raw["log"]["wandb"] = False
        lines.append("use_wandb=true: the package wandb is not installed; curves go to TensorBoard alone")
    return raw, lines


def resume(
    num_epochs: int,
    checkpoint: PathText | None = None,
    checkpoint_dir: PathText | None = None,
    output_dir: PathText | None = None,
    threads: int = 1,
) -> None:
    """Train so many epochs more, from a checkpoint or from the newest whole one of a run.

    num_epochs: epochs after those of the checkpoint
    checkpoint: a checkpoint_epoch_N.pt
    checkpoint_dir: the folder of a run, instead
    output_dir: the run folder of what follows; default: that of the checkpoint
    threads: CPU threads of a process
    """
    if (checkpoint is None) == (checkpoint_dir is None):
        raise UserError("give one of --checkpoint and --checkpoint_dir")
    if num_epochs < 1:
        raise UserError(f"--num_epochs={num_epochs}: expected a whole number of at least 1")
    if checkpoint is not None:
        given, place = f"--checkpoint={checkpoint}", Path(checkpoint).resolve()
        if not place.is_dir():
            raise UserError(f"{given}: no such checkpoint")
        found = Checkpoint.open(place)
    else:
        given = f"--checkpoint_dir={checkpoint_dir}"
        found = newest(Path(str(checkpoint_dir)), given)
    run = found.path.resolve().parents[1]
    folder = run if output_dir is None else Path(output_dir)
    going_on = folder.resolve() == run
    last = list_steps(run / "checkpoints")[0][0]
    if going_on and checkpoint is not None and found.step != last:
        raise UserError(f"{given}: its run has gone on to step {last}; give --output_dir to go on from here elsewhere")
    done = epochs_done(found)

    def made(ranks: int) -> tuple[dict[str, Any], list[str]]:
        raw = load_config(run / "config.yaml", {}).model_dump(mode="json", exclude_unset=True)
        at_once = rows_at_once(int(raw["train"]["global_batch_size"]), ranks)
        raw["train"] |= {"epochs": done + num_epochs, "steps": None, "micro_batch_size": at_once}
        raw["checkpoint"] = {**raw["checkpoint"], "resume": "auto" if going_on else str(found.path)}
        return raw, [f"{found.path}: {done} epochs; {num_epochs} more"]

    _fit(made, folder, threads)


def newest(folder: Path, given: str) -> Checkpoint:
    """The newest checkpoint of a run that is whole; damaged ones are named. UserError where there is none."""
    found, skipped = newest_valid(folder / "checkpoints")
    for line in skipped:
        print(f"skipped: {line}", flush=True)
    if found is None:
        raise UserError(f"{given}: has no whole checkpoint")
    return found


def _fit(made: Callable[[int], tuple[dict[str, Any], list[str]]], folder: Path, threads: int) -> None:
    process.quiet_libraries()
    leave_before_first_step()
    if process.read_world().device.type == "cpu":
        keep_freed()
    world = process.start(WAIT_S, threads)
    config = validate(main_decides(lambda: _checked(made, folder, world), world), "hydra")
    EpochTrainer(config, folder, world).fit()


def _checked(
    made: Callable[[int], tuple[dict[str, Any], list[str]]], folder: Path, world: World
) -> dict[str, Any]:
    """The run's config, written out; what can be refused is refused here."""
    raw, lines = made(world.size)
    config: RunConfig = validate(raw, "hydra")
    for line in lines:
        print(line, flush=True)
    check_layout(config, world.size)
    preflight(config, folder)
    dumped: dict[str, Any] = config.model_dump(mode="json", exclude_unset=True)
    return dumped


def models() -> None:
    """Print the models that there are."""
    print("Available Models:")
    print(RULES[0])
    for kind in ModelType:
        print(f"{kind.value:<16}| {kind.says}")
        print(f"{'':<16}| Default config: {kind.config_file}")
        print(RULES[1])


def debug(model: str = "v1", config: PathText | None = None) -> None:
    """Print the parameters of a model, the shapes of what it gives, and a loss on random tokens.

    model: v1, v2, v3, or baseline, routed, hierarchical
    config: a YAML as of `train`; default: the model's own
    """
    kind = ModelType.named(model)
    said = default_config(kind) if config is None else read_config(config, kind)[0]
    torch.manual_seed(0)
    try:
        made = create_model(kind, said).eval()
    except ValueError as error:
        raise UserError(f"{error}") from None
    print(f"{kind.value}: {kind.says}")
    print(f"layers: {', '.join(said.pattern(kind))}, over and over to {said.n_layers}")
    print(f"parameters: {made.get_num_params():,}")
    for name, module in made.llm.named_children():
        print(f"  {name:<16}{sum(parameter.numel() for parameter in module.parameters()):,}")
    ids = torch.randint(0, said.vocab_size, (2, min(128, said.max_length)))
    with torch.no_grad():
        loss, logits = made(ids, labels=ids)
    print(f"input: {tuple(ids.shape)}")
    print(f"logits: {tuple(logits.shape)}")
    print(f"loss: {loss.item():.4f}")


def main() -> None:
    """Do what the command line says."""
    run_cli(models, train=train, resume=resume, list=models, debug=debug)
