"""Miniformer's modules in Lightning, where it is (`make lightning`, or `make test-full`): they learn, stop early, keep
checkpoints without pickle and go on from them; and one line where it is not."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llm.siblings import miniformer
from llm.siblings.miniformer import Seq2SeqTransformer, TrainConfig, Transformer, TransformerConfig
from llm.train.config import OptimConfig
from llm.train.schedule import lr_factor
from tests.siblings.running import run
from tests.siblings.seeds import blocks_of_file
from tests.siblings.test_miniformer_command import text
from tests.siblings.test_miniformer_page import PAGE

THERE = importlib.util.find_spec("lightning") is not None
needs_lightning = pytest.mark.skipif(not THERE, reason="the package lightning is not installed: make lightning")
QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
TASKS = [
    ("language_modeling", "encoder"), ("language_modeling", "seq2seq"), ("classification", "encoder"),
    ("regression", "encoder"), ("seq2seq", "seq2seq"),
]  # fmt: skip


@pytest.mark.skipif(THERE, reason="the package lightning is installed")
def test_without_lightning_its_names_are_refused_in_one_line() -> None:
    with pytest.raises(ImportError, match=r"MiniFormerLitModule needs the package lightning.*llm\[lightning\]"):
        miniformer.MiniFormerLitModule  # noqa: B018
    with pytest.raises(AttributeError):
        miniformer.MiniFormerNothing  # noqa: B018


def written(folder: Path, name: str, n: int, task: str) -> str:
    rows = []
    for i in range(n):
        of = text(i)
        label: Any = int("cat" in of) if task == "classification" else float(of.count(" "))
        rows.append({"text": of, "label": label, "source": of, "target": of.upper()})
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def asked(folder: Path, task: Any, model: Any, **changes: Any) -> TrainConfig:
    given = {"batch_size": 8, "lr": 3e-3, "max_epochs": 2, "logger": "none", "patience": None, **changes}
    paths = written(folder, "train.jsonl", 24, task), written(folder, "valid.jsonl", 12, task)
    return TrainConfig(*paths, task=task, model=model, work_dir=str(folder / "run"), **given)


def made(config: TrainConfig, **changes: Any) -> Transformer | Seq2SeqTransformer:
    torch.manual_seed(0)
    labels = {"classification": 2, "regression": 1}
    head = {"head": config.task, "num_labels": labels[config.task]} if config.task in labels else {}
    sizes: dict[str, Any] = {"d_model": 16, "n_heads": 2, "n_layers": 1, "dropout": 0.0, "max_seq_len": 128}
    of = TransformerConfig(258, **sizes, **head, **changes)
    return Seq2SeqTransformer(of) if config.model == "seq2seq" else Transformer(of)


def fitted(config: TrainConfig, model: nn.Module, **settings: Any) -> Any:
    trainer = miniformer.lightning_trainer(config, **QUIET, **settings.pop("trainer", {}))
    module = miniformer.MiniFormerLitModule(model, config)
    trainer.fit(module, miniformer.MiniFormerDataModule(config, "bytes", max_length=64), **settings)
    return trainer


@needs_lightning
@pytest.mark.parametrize(("task", "model"), TASKS)
def test_every_task_learns_and_says_its_metrics(tmp_path: Path, task: str, model: str) -> None:
    config = asked(tmp_path, task, model, max_epochs=6, lr=1e-2)
    trainer = fitted(config, made(config), trainer={"num_sanity_val_steps": 0})
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    start = miniformer.MiniFormerLitModule(made(config), config)
    (first,) = trainer.validate(start, miniformer.MiniFormerDataModule(config, "bytes", max_length=64), verbose=False)
    assert metrics["val_loss"] < first["val_loss"]
    of = {"regression": {"val_rmse", "val_mae"}, "classification": {"val_acc"}}
    assert metrics.keys() == {"train_loss", "val_loss"} | of.get(task, {"val_acc", "val_ppl"})


@needs_lightning
def test_a_checkpoint_holds_no_pickle_and_a_run_goes_on_from_it_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    config = asked(tmp_path, "language_modeling", "encoder", max_epochs=4, scheduler="constant")
    whole = made(config)
    fitted(config, whole)
    half = asked(tmp_path, "language_modeling", "encoder", max_epochs=2, scheduler="constant")
    half.work_dir = config.work_dir = str(tmp_path / "resumed")
    trainer = fitted(half, made(half))
    last = Path(trainer.checkpoint_callback.last_model_path)
    assert {file.name for file in last.iterdir()} == {"tensors.safetensors", "state.json"}
    again = made(config)
    fitted(config, again, ckpt_path=str(last))
    ours, theirs = whole.state_dict(), again.state_dict()
    assert trainer.global_step == 6 and all(torch.equal(ours[name], theirs[name]) for name in ours)


@needs_lightning
def test_training_stops_early_where_the_held_out_loss_no_longer_falls(tmp_path: Path) -> None:
    config = asked(tmp_path, "classification", "encoder", max_epochs=50, lr=0.1, patience=1)
    trainer = fitted(config, made(config))
    assert trainer.current_epoch < 49 and trainer.early_stopping_callback.wait_count == 1
    assert Path(trainer.checkpoint_callback.best_model_path).is_dir()


@needs_lightning
@pytest.mark.parametrize("scheduler", ["cosine", "linear", "onecycle", "constant", "wsd"])
def test_the_schedule_is_the_trainers_step_by_step(tmp_path: Path, scheduler: Any) -> None:
    config = asked(tmp_path, "language_modeling", "encoder", scheduler=scheduler)
    rates: list[float] = []
    from lightning.pytorch.callbacks import Callback

    class Rates(Callback):
        def on_train_batch_start(self, trainer: Any, *rest: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    fitted(config, made(config), trainer={"callbacks": [Rates()]})
    schedule = "one_cycle" if scheduler == "onecycle" else scheduler
    optim = OptimConfig.model_validate({"lr": config.lr, "min_lr": 0.0, "schedule": schedule})
    assert rates == pytest.approx([config.lr * lr_factor(optim, 6, step) for step in range(1, 7)])


@needs_lightning
def test_a_model_that_cannot_learn_the_task_is_refused(tmp_path: Path) -> None:
    config = asked(tmp_path, "classification", "encoder")
    with pytest.raises(ValueError, match="task=classification needs a model with head=classification"):
        miniformer.MiniFormerLitModule(made(asked(tmp_path, "language_modeling", "encoder")), config)
    with pytest.raises(ValueError, match="model=seq2seq is a Seq2SeqTransformer; got Transformer"):
        miniformer.MiniFormerLitModule(made(config), asked(tmp_path, "language_modeling", "seq2seq"))


@needs_lightning
def test_the_block_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path, "train.jsonl", 24, "language_modeling")
    written(tmp_path, "val.jsonl", 8, "language_modeling")
    (block,) = (block for block in blocks_of_file(PAGE) if block.heading == "Lightning")
    names: dict[str, Any] = {"TrainConfig": TrainConfig, "model": made(TrainConfig("train.jsonl"))}
    run(block.text, names)
    assert Path("runs/lit/checkpoints/last.ckpt/tensors.safetensors").is_file()


@needs_lightning
def test_what_a_checkpoint_cannot_hold_without_pickle_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="checkpoint.callbacks.mine is a object"):
        miniformer.SafetensorsIO().save_checkpoint({"callbacks": {"mine": object()}}, tmp_path / "a.ckpt")
