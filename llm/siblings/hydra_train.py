"""A training of HYDRA as a run of the one trainer, and what its document says comes of each epoch: a checkpoint
`checkpoint_epoch_N.pt`, a line of `training_log.jsonl`, a summary on the screen.

`checkpoint_epoch_N.pt` is a name of a checkpoint folder in `checkpoints/`, which has all that continues the run and,
in `epoch.json`, what was measured; so it is a path for `resume`, and for whatever else takes a checkpoint.
"""

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from llm.atomic import write_file
from llm.checkpoint.reader import Checkpoint, list_steps
from llm.errors import UserError
from llm.parallel.collectives import main_decides
from llm.siblings.hydra_config import AT_ONCE, ModelType, TrainConfig
from llm.tokenizer import TokenizerConfig
from llm.train.log import RunLog
from llm.train.stop import Requests
from llm.train.trainer import Trainer

LOG, EPOCH = "training_log.jsonl", "epoch.json"
RULE = "=" * 60


def checkpoint_name(epoch: int) -> str:
    """Of an epoch, from 0."""
    return f"checkpoint_epoch_{epoch}.pt"


def raw_config(
    config: TrainConfig, kind: ModelType, data: Path, tokenizer: TokenizerConfig, ranks: int = 1
) -> dict[str, Any]:
    """The run config of a training on the files of a folder, on so many processes, as it would stand in a YAML."""
    raw: dict[str, Any] = {
        "model": config.model_args(kind).model_dump(mode="json", exclude_unset=True),
        "tokenizer": tokenizer.model_dump(mode="json", exclude_unset=True),
        "data": {"train": str(data / "train.jsonl"), "cache_dir": str(Path(config.output_dir) / "cache")},
        "optim": {
            "lr": config.learning_rate,
            "weight_decay": config.weight_decay,
            "clip_norm": config.grad_clip,
            "schedule": "cosine",
        },
        "train": {
            "epochs": config.num_epochs,
            "global_batch_size": config.batch_size,
            "micro_batch_size": rows_at_once(config.batch_size, ranks),
            "seq_len": config.max_length,
            "precision": "auto" if config.use_mixed_precision else "fp32",
        },
        # a checkpoint an epoch, written before the next one begins; all of them stay
        "checkpoint": {"interval": 1 << 40, "keep": 1 << 20, "keep_best": False, "asynchronous": False},
        "eval": {"interval_epochs": 1, "rows": None},
        "log": {"wandb": config.use_wandb},
    }
    if (data / "validation.jsonl").is_file():
        raw["data"]["valid"] = str(data / "validation.jsonl")
    return raw


def rows_at_once(batch_size: int, ranks: int) -> int:
    """Rows of a forward: as many as divide the batch of a process, at most AT_ONCE."""
    of_each = max(batch_size // ranks, 1)
    return max(n for n in range(1, min(of_each, AT_ONCE) + 1) if of_each % n == 0)


class EpochTrainer(Trainer):
    """The trainer, with an end of each pass over the training rows."""

    def _after_step(
        self, row: dict[str, Any], log: RunLog | None, notes: list[str], requests: Requests
    ) -> str | None:
        end = super()._after_step(row, log, notes, requests)
        if self._is_due(0):
            self.saver.save_and_finish(log, last=end is not None)
            failed = main_decides(lambda: self._close_epoch(row, log), self.run.world)
            if failed:
                raise UserError(failed)
        return end

    def _is_due(self, interval: int) -> bool:
        """Whether the last step ended a pass, or the run. No interval says it: where the batch does not divide the
        rows, passes have not all as many steps."""
        batch = self.run.config.train.global_batch_size
        return self.progress.step == self.run.steps or self._passes() > self._passes(batch)

    def _passes(self, before: int = 0) -> int:
        """Whole passes over the training rows, of those that the run is to make; so many rows before its place."""
        done = (self.progress.consumed_rows - before) // self.run.mixture.n_rows
        return done if self.run.epochs is None else min(done, int(self.run.epochs))

    def _close_epoch(self, row: Mapping[str, Any], log: RunLog | None) -> str | None:
        """Write down what an epoch was, on the main process; why that failed, in a line."""
        step, n_rows, batch = self.progress.step, self.run.mixture.n_rows, self.run.config.train.global_batch_size
        epoch = max(self._passes() - 1, 0)
        steps_of_it = self.progress.consumed_rows // batch - -(-epoch * n_rows // batch)
        said = summary(self.run.folder, epoch, step - steps_of_it, row)
        try:
            target = self.run.store.path(step)
            write_file(target / EPOCH, (json.dumps(said, indent=1) + "\n").encode())
            _call(self.run.folder / checkpoint_name(epoch), target)
            _append(self.run.folder / LOG, said)
        except OSError as error:
            return f"{self.run.folder}: epoch {epoch} cannot be written down: {error.strerror or error}"
        if log:
            log.say(shown(said))
        return None


def epochs_done(found: Checkpoint) -> int:
    """Epochs that were closed at a checkpoint or before it, in its run or the one that this goes on from."""
    run = found.path.resolve().parents[1]
    for step, path in sorted(list_steps(run / "checkpoints"), reverse=True):
        if step <= found.step and (path / EPOCH).is_file():
            return int(json.loads((path / EPOCH).read_text())["epoch"]) + 1
    began = Path(found.meta_with("config")["config"]["checkpoint"]["resume"])
    return epochs_done(Checkpoint.open(began.resolve())) if (began / "manifest.json").is_file() else 0


def summary(folder: Path, epoch: int, after: int, last: Mapping[str, Any]) -> dict[str, Any]:
    """What is said of an epoch, whose steps come after step `after` and end with the row `last` of metrics.jsonl."""
    losses, weights, seconds = [], [], 0.0
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if after < row["step"] <= last["step"] and row.get("loss") is not None:
            losses.append(row["loss"])
            weights.append(row["targets"])
            seconds += row["step_time_s"]
    mean = sum(loss * weight for loss, weight in zip(losses, weights, strict=True)) / max(sum(weights), 1)
    valid = last.get("valid_loss")
    return {
        "timestamp": datetime.now().isoformat(timespec="seconds"),
        "epoch": epoch,
        "train_loss": mean if losses else None,
        "val_loss": valid,
        "val_perplexity": None if valid is None else math.exp(min(valid, 700.0)),
        "epoch_time_seconds": seconds,
        "learning_rate": last["lr"],
    }


def shown(said: Mapping[str, Any]) -> str:
    """What is printed of an epoch."""
    lines = [
        ("Train Loss:", _number(said["train_loss"], ".4f")),
        ("Val Loss:", _number(said["val_loss"], ".4f")),
        ("Val Perplexity:", _number(said["val_perplexity"], ".2f")),
        ("Epoch Time:", f"{said['epoch_time_seconds']:.1f}s"),
        ("Learning Rate:", f"{said['learning_rate']:.2e}"),
    ]
    body = [f"{name:<18}{value}" for name, value in lines]
    return "\n".join([RULE, f"EPOCH {said['epoch']} SUMMARY", RULE, *body, RULE])


def _number(value: float | None, form: str) -> str:
    return "none" if value is None else format(value, form)


def _call(name: Path, target: Path) -> None:
    """Make `name` mean a folder beside it, at once."""
    beside = name.with_name(f".{name.name}.new")
    with suppress(FileNotFoundError):
        beside.unlink()
    beside.symlink_to(os.path.relpath(target, name.parent))
    beside.replace(name)


def _append(file: Path, said: Mapping[str, Any]) -> None:
    """Add a line for an epoch; one that was trained again takes the place of what was said of it and of later ones."""
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    kept = [line for line in lines if line["epoch"] < said["epoch"]]
    write_file(file, "".join(json.dumps(line) + "\n" for line in [*kept, said]).encode())
