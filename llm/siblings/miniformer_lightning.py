"""Miniformer's models in PyTorch Lightning: a module with loss, metrics, optimizer and schedule, a data module, and a
trainer with early stopping, logger and checkpoints as TrainConfig says.

It is for who works in Lightning; many processes, layouts and exact resumes are the one trainer's (the command line).
Checkpoints hold no pickle: tensors lie in a safetensors file, the rest beside them as JSON (`SafetensorsIO`).
"""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from llm.batch import IGNORE
from llm.siblings.miniformer_checkpoint import SafetensorsIO
from llm.siblings.miniformer_data import Item, JSONLinesDataset
from llm.siblings.miniformer_model import Transformer
from llm.siblings.miniformer_seq2seq import Seq2SeqTransformer
from llm.siblings.miniformer_train import SCHEDULES, TrainConfig
from llm.tokenizer import Tokenizer
from llm.train.config import OptimConfig
from llm.train.schedule import lr_factor

__all__ = ["MiniFormerDataModule", "MiniFormerLitModule", "SafetensorsIO", "lightning_trainer"]

FOLLOWED = "val_loss"
COLUMNS = ("text_column", "label_column", "source_column", "target_column")


class Shuffled(Sampler[int]):
    """Another order of n items in every pass, by seed and pass alone, so that a run that goes on has the same."""

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.seed, self.epoch = n, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning says which pass comes."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[int]:
        drawn = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        yield from torch.randperm(self.n, generator=drawn).tolist()


class MiniFormerLitModule(pl.LightningModule):
    """A model that learns a task: train_loss a step; val_loss, and val_ppl, val_acc or val_rmse and val_mae a pass."""

    def __init__(self, model: Transformer | Seq2SeqTransformer, config: TrainConfig) -> None:
        """ValueError where the model cannot learn the task."""
        super().__init__()
        wanted = Seq2SeqTransformer if config.model == "seq2seq" else Transformer
        if not isinstance(model, wanted):
            raise ValueError(f"model={config.model} is a {wanted.__name__}; got {type(model).__name__}")
        head = config.task if config.task in ("classification", "regression") else "tokens"
        if model.config.head != head:
            raise ValueError(f"task={config.task} needs a model with head={head}; its config has {model.config.head}")
        self.model, self.config = model, config

    def forward(self, batch: Item) -> Tensor:
        """What the model gives for a batch of JSONLinesDataset."""
        if self.config.model == "seq2seq":
            tokens = batch["input_ids"], batch["decoder_input_ids"]
            found: Tensor = self.model(*tokens, batch.get("attention_mask"), batch.get("decoder_attention_mask"))
        else:
            found = self.model(batch["input_ids"], batch.get("attention_mask"))
        return found

    def loss(self, found: Tensor, labels: Tensor) -> Tensor:
        """The mean over labels that are there: cross entropy of tokens or classes, squared error of values."""
        if self.config.task == "regression":
            known = ~labels.isnan()
            squares = (found - labels.nan_to_num()).square() * known
            return squares.sum() / known.sum().clamp(min=1)
        total = F.cross_entropy(found.flatten(0, -2), labels.flatten(), ignore_index=IGNORE, reduction="sum")
        return total / (labels != IGNORE).sum().clamp(min=1)

    def training_step(self, batch: Item, batch_idx: int) -> Tensor:
        loss = self.loss(self(batch), batch["labels"])
        self.log("train_loss", loss, batch_size=len(batch["input_ids"]))
        return loss

    def on_validation_epoch_start(self) -> None:
        self._sums: dict[str, float] = {}

    def validation_step(self, batch: Item, batch_idx: int) -> None:
        labels = batch["labels"]
        found = self(batch)
        if self.config.task == "regression":
            error = (found - labels)[~labels.isnan()].double()
            sums = {"n": error.numel(), "loss": error.square().sum(), "absolute": error.abs().sum()}
        else:
            counts = labels != IGNORE
            hits = (found.argmax(-1) == labels) & counts
            sums = {"n": counts.sum(), "loss": self.loss(found, labels) * counts.sum(), "hits": hits.sum()}
        for key, value in sums.items():
            self._sums[key] = self._sums.get(key, 0.0) + float(value)

    def on_validation_epoch_end(self) -> None:
        sums = self._sums
        n = max(sums["n"], 1.0)
        loss = sums["loss"] / n
        metrics = {FOLLOWED: loss}
        if self.config.task == "regression":
            metrics |= {"val_rmse": math.sqrt(loss), "val_mae": sums["absolute"] / n}
        else:
            metrics["val_acc"] = sums["hits"] / n
            if self.config.task != "classification":
                metrics["val_ppl"] = math.exp(min(loss, 700.0))
        self.log_dict(metrics, prog_bar=True)

    def configure_optimizers(self) -> Any:
        """AdamW, whose decay is of matrices alone, and the schedule of the one trainer, step by step."""
        config, steps = self.config, int(self.trainer.estimated_stepping_batches)
        decayed = [p for p in self.parameters() if p.requires_grad and p.ndim >= 2]
        others = [p for p in self.parameters() if p.requires_grad and p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.999))
        optim = OptimConfig.model_validate(
            {"lr": config.lr, "min_lr": 0.0, "schedule": SCHEDULES.get(config.scheduler, config.scheduler),
             "warmup_steps": config.warmup_steps}  # fmt: skip
        )

        def factor(step: int) -> float:
            return lr_factor(optim, steps, min(step + 1, steps))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class MiniFormerDataModule(pl.LightningDataModule):
    """The files of a TrainConfig as data loaders."""

    def __init__(
        self,
        config: TrainConfig,
        tokenizer: Tokenizer | str | Path,
        *,
        max_length: int | None = None,
        num_workers: int = 0,
        collate: Callable[[list[Item]], Item] | None = None,
    ) -> None:
        """max_length: tokens of an item (None = config.seq_len, or all). collate: makes a batch of items; None = as
        JSONLinesDataset does."""
        super().__init__()
        self.config, self.tokenizer, self.num_workers, self.collate = config, tokenizer, num_workers, collate
        self.max_length = config.seq_len if max_length is None else max_length
        self.train: JSONLinesDataset | None = None
        self.valid: JSONLinesDataset | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read both files, once. UserError naming the file and line of a wrong record."""
        if self.train is not None:
            return
        self.train = self._dataset(self.config.train_path)
        if self.config.val_path is not None:
            self.valid = self._dataset(self.config.val_path, self.train.classes or None)
        for dataset in filter(None, (self.train, self.valid)):
            if dataset.n_cut:
                print(f"{dataset.path}: {dataset.n_cut} texts are cut after {self.max_length} tokens")

    def train_dataloader(self) -> DataLoader[Item]:
        assert self.train is not None
        return self._loader(self.train, sampler=Shuffled(len(self.train), self.config.seed))

    def val_dataloader(self) -> DataLoader[Item] | list[Any]:
        return [] if self.valid is None else self._loader(self.valid)

    def _dataset(self, path: str, classes: tuple[str, ...] | None = None) -> JSONLinesDataset:
        config = self.config
        return JSONLinesDataset(
            path,
            self.tokenizer,
            config.task,
            model=config.model,
            max_length=self.max_length,
            classes=classes,
            **{key: getattr(config, key) for key in COLUMNS},
        )

    def _loader(self, dataset: JSONLinesDataset, **how: Any) -> DataLoader[Item]:
        collate = dataset.collate if self.collate is None else self.collate
        size, workers = self.config.batch_size, self.num_workers
        return DataLoader(dataset, size, collate_fn=collate, num_workers=workers, **how)


def lightning_trainer(config: TrainConfig, **settings: Any) -> pl.Trainer:
    """Lightning's trainer for a TrainConfig: passes, clipping, logger, the best and the last checkpoint in
    work_dir/checkpoints, early stopping where there are held-out rows. settings: further ones of pl.Trainer."""
    pl.seed_everything(config.seed, verbose=False)
    follows = config.val_path is not None
    kept = ModelCheckpoint(
        dirpath=Path(config.work_dir) / "checkpoints", monitor=FOLLOWED if follows else None, save_last=True
    )
    callbacks: list[Any] = [kept]
    if follows and config.patience is not None:
        callbacks.append(EarlyStopping(monitor=FOLLOWED, patience=config.patience))
    return pl.Trainer(
        **{
            "max_epochs": config.max_epochs,
            "default_root_dir": config.work_dir,
            "gradient_clip_val": config.clip_norm or None,
            "logger": LOGGERS[config.logger](config.work_dir),
            "callbacks": callbacks,
            "plugins": [SafetensorsIO()],
            **settings,
        }
    )


LOGGERS: Mapping[str, Callable[[str], Logger | bool]] = {
    "tensorboard": lambda folder: TensorBoardLogger(folder, name="tb"),
    "csv": lambda folder: CSVLogger(folder, name="csv"),
    "wandb": lambda folder: WandbLogger(save_dir=folder),
    "none": lambda folder: False,
}
